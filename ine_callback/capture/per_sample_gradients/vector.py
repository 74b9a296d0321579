"""Gradients that are small enough to be formed: scales and shifts of norms, single biases, the fallback's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.capture.per_sample_gradients.base import GradSample, of_rows


@dataclass(frozen=True)
class Vector(GradSample):
    """Materialised per-sample gradients ``g`` [b, D]."""

    g: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    @property
    def rows(self) -> int:
        return self.g.shape[0]

    @property
    def layout(self) -> tuple[int, ...]:
        return (self.g.shape[1],)

    @property
    def units(self) -> tuple[int, ...]:
        return self.layout

    def by_row(self, count: int, consecutive: bool) -> Vector:
        return Vector(of_rows(self.g, count, consecutive).sum(1))

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bd,qcd->bqc", self.g, direction[:, None] * weights)

    def unit_energies(self, weights: Tensor) -> Tensor:
        return self.g.square() @ weights.T

    def gradient(self, rows: slice) -> Tensor:
        return self.g[rows]

    def total(self) -> Tensor:
        return self.g.sum(0)

    def weighted(self, weights: Tensor) -> Vector:
        return Vector(self.g * weights[:, None])

    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.g.square().sum(0), self.g.new_ones(())

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Vector:
        return self

    def norms(self, weights: Tensor) -> Tensor:
        return self.g.square() @ weights.T

    def squared_norms(self) -> Tensor:
        return self.g.square().sum(1)
