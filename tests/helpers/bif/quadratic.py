"""Quadratic row losses, for which the covariances that BIF estimates are known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WHOLE = 10**6  # a batch size that takes all rows: no minibatch noise


PLAIN = {"preconditioner": "none", "reduced": False}


class Point(nn.Module):
    """Parameters alone: losses are functions of w."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())


def forms(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Row loss gᵢ·w + ½ wᵀ Hᵢ w."""
    g, h = batch
    return g @ module.w + 0.5 * torch.einsum("i,bij,j->b", module.w, h, module.w)


def exact(batch: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], v: Tensor) -> NDArray[np.float64]:
    """gᵢᵀ V gⱼ + ½ tr(Hᵢ V Hⱼ V)."""
    (g, h), (gq, hq) = batch, query
    quadratic = torch.einsum("iab,bc,jcd,da->ij", h, v, hq, v)
    return (g @ v @ gq.T + 0.5 * quadratic).double().numpy()


def quadratic_problem(rows: int = 12, p: int = 5) -> tuple[Point, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows with mean gradient 0 and the mean Hessian as their Fisher, at w* = 0, and three queries; float64."""
    g = torch.Generator().manual_seed(5)

    def symmetric(n: int) -> Tensor:
        root = torch.randn(n, p, p, generator=g, dtype=torch.float64)
        return root @ root.mT / p

    slopes = torch.randn(rows, p, generator=g, dtype=torch.float64)
    white, _ = torch.linalg.qr(slopes - slopes.mean(0))
    curvature = symmetric(rows)
    data = (white * rows**0.5 @ torch.linalg.cholesky(curvature.mean(0)).T, curvature)
    return Point(torch.zeros(p, dtype=torch.float64)), data, (torch.randn(3, p, generator=g).double(), symmetric(3))
