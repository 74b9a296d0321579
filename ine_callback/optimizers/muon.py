"""Muon: an orthogonalised update, linearised by one scalar for each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.distributed.sharding import whole
from ine_callback.optimizers.blocks import State, block_mean
from ine_callback.optimizers.registry import Group, Rate, UpdateRule, register_optimizer


class MuonRule(UpdateRule):
    """w -= lr a NS(c) with b = momentum b + (1 - momentum) g, c = b, or momentum b + (1 - momentum) g with Nesterov.

    NS are a few Newton-Schulz iterations that bring all singular values near 1, and a depends on the matrix's shape.
    NS(c) is taken as c |NS(b)| / |b| in Frobenius norms: the update that is as large, along c. That is an
    approximation, exact where b has singular values that NS maps to equal multiples of them. b is an average, so a
    gradient's total effect is 1, with Nesterov too, and the effective learning rate is lr. Before the first step b is
    the present gradient. Weight decay is decoupled, by lr without a.
    """

    rate_options = (*UpdateRule.rate_options, "nesterov", "adjust_lr_fn")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        def ratio(p: nn.Parameter, b: Tensor) -> Tensor:
            norm = b.norm()
            found = torch.where(norm > 0, orthogonalised(b, group).norm() / norm, 0.0)
            return found * shape_factor(p.shape, group.get("adjust_lr_fn")) * p.numel()

        def warm(p: nn.Parameter, state: State) -> Tensor:
            return ratio(p, whole(state["momentum_buffer"]).float())

        found = block_mean(optimizer, parameters, unscale, warm, ratio)
        scale: Tensor | float = 0.0 if found is None else found
        return Rate(float(group["lr"]), self.step(group), scale, float(group["weight_decay"]), scale)


if hasattr(torch.optim, "Muon"):  # torch 2.9
    register_optimizer(torch.optim.Muon)(MuonRule)


def orthogonalised(matrix: Tensor, group: Group) -> Tensor:
    """Muon's Newton-Schulz iterations X <- a X + (b XX' + c (XX')^2) X, from a matrix of norm 1; in float32.

    Example:
        >>> group = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
        >>> found = torch.linalg.svdvals(orthogonalised(torch.diag(torch.tensor([4.0, 2.0, 1.0])), group))
        >>> bool(((found > 0.6) & (found < 1.3)).all())
        True
    """
    a, b, c = group["ns_coefficients"]
    x: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def shape_factor(shape: Any, kind: str | None) -> float:
    """What Muon multiplies lr by for a matrix of this shape.

    Example:
        >>> shape_factor((8, 2), None), shape_factor((25, 2), "match_rms_adamw")
        (2.0, 1.0)
    """
    rows, columns = shape[:2]
    return 0.2 * math.sqrt(max(rows, columns)) if kind == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))
