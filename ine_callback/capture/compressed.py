"""Each row's gradient in a few columns of its inputs: small enough to be formed, and all else is read off it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to so many queries a direction is turned for each contrast first: one matrix product instead of many small ones.
FEW_QUERIES = 4


@dataclass(frozen=True)
class Compressed:
    """Gradients times k columns, ``g_i S``.

    Attributes:
        g: They [b, G, O, k].
    """

    g: Tensor

    def part(self, columns: slice) -> Compressed:
        """Some of the columns."""
        return Compressed(self.g[..., columns])

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        """Inner products with directions [Q, G, O, k], see :meth:`.Record.parts`: [b, Q, C]."""
        queries = direction.shape[0]
        if queries > FEW_QUERIES:
            units: Tensor = torch.einsum("bgoi,qgoi->bqgo", self.g, direction)
            return units.flatten(2) @ weights.T
        turned = direction[:, None] * weights.view(-1, *self.g.shape[1:3], 1)
        found: Tensor = (self.g.flatten(1) @ turned.flatten(2).flatten(0, 1).T).unflatten(1, (queries, -1))
        return found

    def energies(self, weights: Tensor) -> Tensor:
        """Weighted squared gradients of output units [b, C]."""
        return self.g.square().sum(3).flatten(1) @ weights.T

    def norms_in(self, left: Tensor | None, weights: Tensor) -> Tensor:
        """``sum weight * (left^T g_i S)^2`` [b, C] with C weights [C, G, n, k]."""
        turned = self.g if left is None else left.transpose(-1, -2) @ self.g
        return turned.square().flatten(1) @ weights.flatten(1).T
