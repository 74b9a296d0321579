"""Sides of a layer with random eigenvectors, rows drawn from their covariances, and sketches of the discount."""

from __future__ import annotations

import torch
from torch import Tensor

from ine_callback.capture import Outer
from ine_callback.curvature.low_rank import Side
from ine_callback.curvature.spectral import SketchedOperator, SpectralOperator

OUT, IN = 60, 80


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(size: int, power: float, seed: int) -> Side:
    """A covariance with eigenvalues 1, 2^-power, 3^-power, …"""
    vectors = torch.linalg.qr(draw(size, size, seed=seed)).Q[None]
    values = torch.arange(1, size + 1).double() ** -power
    return Side(values.flip(0)[None], vectors)


def rows_of(left: Side, right: Side, count: int, positions: int = 1, seed: int = 5) -> Outer:
    """Rows whose inputs and output gradients have the two covariances, independent of each other."""

    def sample(side: Side, seed: int) -> Tensor:
        assert side.vectors is not None
        size = side.values.shape[-1]
        return draw(count, 1, positions, size, seed=seed) * side.values.sqrt() @ side.vectors.transpose(-1, -2)

    return Outer(sample(right, seed), sample(left, seed + 1))


def discount(left: Side, right: Side, exponent: float) -> SpectralOperator:
    values = left.values[..., :, None] * right.values[..., None, :]
    return SpectralOperator(torch.exp(-exponent * values), (left, right))


LEFT, RIGHT = side(OUT, 1.5, 1), side(IN, 1.5, 2)


def sketch(exponent: float, seed: int = 0) -> SketchedOperator:
    found = discount(LEFT, RIGHT, exponent).sketched()
    assert isinstance(found, SketchedOperator)
    found.draw(torch.Generator().manual_seed(seed))
    return found
