"""Per-sample gradients times a few columns: small enough to be formed, and enough for all products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this number of queries, unit weights are multiplied into the direction first: one matrix product, not many.
MAX_WEIGHTED_QUERIES = 8


def weighted_columns(direction: Tensor, weights: Tensor) -> Tensor:
    """Directions [Q, G, O, k] times C weights of their units [C, G O], as the columns of a matrix [G k O, Q C]."""
    units = weights.view(len(weights), direction.shape[1], 1, -1)
    return (direction.transpose(-1, -2)[:, None] * units).flatten(2).flatten(0, 1).T


@dataclass(frozen=True)
class CompressedGradients:
    """Gradients times k columns, transposed: ``(g_i S)^T``. So a part of the columns is contiguous.

    Attributes:
        g: The products [b, G, k, O].
    """

    g: Tensor

    def part(self, columns: slice) -> CompressedGradients:
        """Some of the columns."""
        return CompressedGradients(self.g[:, :, columns])

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        """Inner products with directions [Q, G, O, k], see :meth:`.GradSample.parts`: [b, Q, C]."""
        queries = direction.shape[0]
        if queries > MAX_WEIGHTED_QUERIES:
            return self.units(direction) @ weights.T
        return self.contract(weighted_columns(direction, weights)).view(len(self.g), queries, -1)

    def units(self, direction: Tensor) -> Tensor:
        """Each unit's part of the inner products with directions [Q, G, O, k]: [b, Q, G O]."""
        found: Tensor = torch.einsum("bgio,qgoi->bqgo", self.g, direction)
        return found.flatten(2)

    def contract(self, columns: Tensor) -> Tensor:
        """Products [b, n] of the flattened gradients with columns [G k O, n]."""
        return self.g.flatten(1) @ columns

    def unit_energies(self, weights: Tensor) -> Tensor:
        """Weighted squared gradients of output units [b, C], weights [C, G O]."""
        return self.g.square().sum(2).flatten(1) @ weights.T

    def norms_in(self, left: Tensor | None, weights: Tensor) -> Tensor:
        """``sum weight * (left^T g_i S)^2`` [b, C] with C weights [G k n, C]."""
        rotated = self.g if left is None else self.g @ left
        return rotated.square().flatten(1) @ weights
