"""Per-sample gradients of random numbers, the factors that K-FAC makes of them, and operators as dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ine_callback.capture import Block, GradSample, Outer
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import SpectralOperator


def block(grad_sample: GradSample, tied: bool = False) -> Block:
    return Block("w", (nn.Parameter(torch.zeros(grad_sample.layout)),), grad_sample.layout, tied=tied)


def observed(
    *steps: GradSample | Sequence[GradSample], terms: float = 1.0, max_dim: int = 1024, tied: bool = False
) -> tuple[Block, KFAC]:
    """Factors after one observation (or several uses) a step."""
    uses = [[step] if isinstance(step, GradSample) else step for step in steps]
    own, kfac = block(uses[0][0], tied), KFAC(max_dim)
    for grad_samples in uses:
        for grad_sample in grad_samples:
            kfac.observe(own, grad_sample, terms)
        kfac.end_step()
    return own, kfac


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def outer(rows: int = 5, groups: int = 1, positions: int = 1, out: int = 2, inputs: int = 3) -> Outer:
    return Outer(draw(rows, groups, positions, inputs), draw(rows, groups, positions, out))


def dense(discount: SpectralOperator, layout: tuple[int, ...]) -> Tensor:
    """D as a matrix over the flattened layout."""
    size = int(torch.Size(layout).numel())
    return discount.apply(torch.eye(size, dtype=torch.float64).reshape(size, *layout)).reshape(size, size).T
