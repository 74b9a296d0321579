"""Each row's gradient in a few columns of its inputs: small enough to be formed, and all else is read off it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to so many queries a direction is turned for each contrast first: one matrix product instead of many small ones.
FEW_QUERIES = 8


def turned(direction: Tensor, weights: Tensor) -> Tensor:
    """Directions [Q, G, O, k] weighted by their units in C ways [C, G O], as a matrix [G k O, Q C]."""
    units = weights.view(len(weights), direction.shape[1], 1, -1)
    return (direction.transpose(-1, -2)[:, None] * units).flatten(2).flatten(0, 1).T


@dataclass(frozen=True)
class CompressedGradients:
    """Gradients times k columns, transposed: ``(g_i S)^T``, so that a part of the columns lies in one piece.

    Attributes:
        g: They [b, G, k, O].
    """

    g: Tensor

    def part(self, columns: slice) -> CompressedGradients:
        """Some of the columns."""
        return CompressedGradients(self.g[:, :, columns])

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        """Inner products with directions [Q, G, O, k], see :meth:`.GradSample.parts`: [b, Q, C]."""
        queries = direction.shape[0]
        if queries > FEW_QUERIES:
            units: Tensor = torch.einsum("bgio,qgoi->bqgo", self.g, direction)
            return units.flatten(2) @ weights.T
        return self.met(turned(direction, weights)).view(len(self.g), queries, -1)

    def met(self, columns: Tensor) -> Tensor:
        """Products [b, n] of the flattened gradients with columns [G k O, n]."""
        return self.g.flatten(1) @ columns

    def energies(self, weights: Tensor) -> Tensor:
        """Weighted squared gradients of output units [b, C], weights [C, G O]."""
        return self.g.square().sum(2).flatten(1) @ weights.T

    def norms_in(self, left: Tensor | None, weights: Tensor) -> Tensor:
        """``sum weight * (left^T g_i S)^2`` [b, C] with C weights [G k n, C]."""
        seen = self.g if left is None else self.g @ left
        return seen.square().flatten(1) @ weights
