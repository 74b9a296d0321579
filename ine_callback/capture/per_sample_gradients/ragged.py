"""Gradients of entries whose rows an index tells: any number a row, anywhere (packed texts, nodes, experts).

Every entry is contracted by itself, as a row would be, and what comes of it is added up by row. Where that is not
linear (norms), the rows' gradients are formed, some at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.per_sample_gradients.base import GradSample, row_chunks, widened
from ine_callback.capture.per_sample_gradients.compressed import CompressedGradients
from ine_callback.capture.per_sample_gradients.lookup import Entries, Lookup
from ine_callback.capture.per_sample_gradients.outer import Outer
from ine_callback.capture.per_sample_gradients.vector import Vector
from ine_callback.capture.per_sample_gradients.windows import Windows


@dataclass(frozen=True)
class Ragged(GradSample):
    """What the classes below add to those of entries that are rows.

    Attributes:
        index: Row of each entry [n], int64; ``count`` for an entry of no row (padding).
        count: Number of rows b.
    """

    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    count: int = 0

    @property
    def rows(self) -> int:
        return self.count

    @property
    def positions(self) -> None:
        return None

    def position_signals(self, direction: Tensor) -> None:
        return None

    def by_row_index(self, x: Tensor) -> Tensor:
        """Sums by row [b, ...] of what entries have [n, ...]."""
        return sums_by_row(x, self.index, self.count)

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        return self.by_row_index(super().parts(direction, weights))  # type: ignore[safe-super]

    def low_rank_signals(self, left: Tensor, right: Tensor) -> Tensor:
        return self.by_row_index(super().low_rank_signals(left, right))

    def unit_energies(self, weights: Tensor) -> Tensor:
        return self.by_row_index(super().unit_energies(weights))  # type: ignore[safe-super]

    def weighted(self, weights: Tensor) -> GradSample:
        of_entries = torch.cat([weights, weights.new_zeros(1)])[self.index]
        return super().weighted(of_entries)  # type: ignore[safe-super]

    def total(self) -> Tensor:
        entries = super().weighted((self.index < self.count).to(self.dtype))  # type: ignore[safe-super]
        return super(Ragged, entries).total()  # type: ignore[misc, no-any-return]

    def norms(self, weights: Tensor) -> Tensor:
        flat = weights.flatten(1).T
        return torch.cat([self.gradient(s).square_().flatten(1) @ flat for s in row_chunks(self.rows, flat.shape[0])])

    def squared_norms(self) -> Tensor:
        chunks = row_chunks(self.rows, self.layout[0] * self.layout[1] * self.layout[2])
        return torch.cat([self.gradient(s).square_().sum((1, 2, 3)) for s in chunks])


@dataclass(frozen=True)
class RaggedOuter(Ragged, Outer):  # type: ignore[misc]  # its gradients have lost their positions
    """Outer products of entries."""

    def gradient(self, rows: slice | Tensor) -> Tensor:
        chosen = torch.arange(self.count, device=self.index.device)[rows]
        inputs, out = self.formed(), self.output_grads
        found = [self._gradient(row, inputs, out) for row in chosen.split(max(1, _FORMED // max(1, out.numel())))]
        return torch.cat(found) if found else out.new_zeros(0, *self.layout)

    def _gradient(self, rows: Tensor, inputs: Tensor, out: Tensor) -> Tensor:
        mine = (self.index == rows[:, None]).to(out.dtype)  # no synchronisation, whoever has how many
        return torch.einsum("rn,ngpo,ngpi->rgoi", mine, out, inputs)

    def compressed(self, columns: Tensor) -> CompressedGradients:
        inputs, (groups, out, _) = self.projected(columns), self.layout
        total = widened(self.output_grads[:0]).new_zeros(self.count + 1, groups, columns.shape[-1], out)
        for some in row_chunks(len(inputs), total[0].numel()):
            total.index_add_(0, self.index[some], self._compressed(inputs[some], some).g)
        return CompressedGradients(total[: self.count])

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Outer:
        found = super().rotated(left, right)
        held = {each.name: getattr(found, each.name) for each in fields(Outer)}
        return found if right is None else RaggedOuter(**held, index=self.index, count=self.count)

    def transposed(self) -> Outer:
        return RaggedOuter(self.output_grads, self.formed(), index=self.index, count=self.count)


_FORMED = 1 << 24  # entries' output gradients, times rows, that are held at once


@dataclass(frozen=True)
class RaggedEntries(RaggedOuter, Entries):  # type: ignore[misc]
    """One-hot inputs of entries."""


@dataclass(frozen=True)
class RaggedLookup(Ragged, Lookup):  # type: ignore[misc]
    """Looked-up entries of an embedding table."""

    def gradient(self, rows: slice | Tensor) -> Tensor:
        width = self.output_grads.shape[-1]
        places = self.index[:, None] * self.entries + self.ids  # [n, P]
        total = self.output_grads.new_zeros((self.count + 1) * self.entries, width)
        total.index_add_(0, places.flatten(), self.output_grads.flatten(0, 1))
        return total.view(self.count + 1, 1, self.entries, width)[: self.count][rows]

    def transposed(self) -> Entries:
        output_grads = self.output_grads[:, None]
        return RaggedEntries(self.ids, output_grads, entries=self.entries, index=self.index, count=self.count)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Lookup:
        if left is not None:
            return super().rotated(left, right)
        return self if right is None else replace(self, output_grads=self.output_grads @ right)

    def norms(self, weights: Tensor) -> Tensor:
        return torch.stack([self._norms(self.output_grads * weight[0].sqrt()[self.ids]) for weight in weights], 1)

    def squared_norms(self) -> Tensor:
        return self._norms(self.output_grads)

    def _norms(self, output_grads: Tensor) -> Tensor:
        # gradients of equal ids of a row add up before they are squared: sorted, they are neighbours
        places = (self.index[:, None] * self.entries + self.ids).flatten()
        order = places.argsort()
        places = places[order]
        group = torch.cat([places.new_zeros(1), (places[1:] != places[:-1]).long().cumsum(0)])[: len(places)]
        summed = torch.zeros_like(output_grads.flatten(0, 1)).index_add_(0, group, output_grads.flatten(0, 1)[order])
        rows = torch.full_like(group, self.count).scatter_(0, group, places // self.entries)
        return sums_by_row(summed.square().sum(1), rows, self.count)


def sums_by_row(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums [b, ...] of x [n, ...] by the row of each entry; those of no row have the index b."""
    return x.new_zeros(rows + 1, *x.shape[1:]).index_add_(0, index, x)[:rows]


def of_entries(grad_sample: GradSample, index: Tensor, rows: int) -> GradSample:
    """The rows' gradients, of entries whose rows an index tells.

    Args:
        grad_sample: The gradients of n entries, as of n rows.
        index: Row of each entry [n]; b for an entry of no row.
        rows: Number of rows b.

    Example:
        >>> of_entries(Vector(torch.tensor([[1.0], [2.0], [4.0]])), torch.tensor([0, 1, 0]), rows=2).g
        tensor([[5.],
                [2.]])
    """
    if isinstance(grad_sample, Vector):
        return Vector(sums_by_row(grad_sample.g, index, rows))
    held: dict[str, Any] = {each.name: getattr(grad_sample, each.name) for each in fields(grad_sample)}  # type: ignore[arg-type]
    if isinstance(grad_sample, Lookup):
        return RaggedLookup(**held, index=index, count=rows)
    assert isinstance(grad_sample, Outer)
    if isinstance(grad_sample, Windows):
        held = {"activations": replace(grad_sample, ones=False).formed(), "output_grads": grad_sample.output_grads}
        return RaggedOuter(**held, ones=grad_sample.ones, index=index, count=rows)
    return (RaggedEntries if isinstance(grad_sample, Entries) else RaggedOuter)(**held, index=index, count=rows)
