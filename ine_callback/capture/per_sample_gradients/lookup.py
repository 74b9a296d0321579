"""Gradients of embedding tables: each row's gradient is nonzero only in the entries that it looked up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ine_callback.capture.per_sample_gradients.base import GradSample, covariance, of_rows
from ine_callback.capture.per_sample_gradients.outer import Outer


@dataclass(frozen=True)
class Entries(Outer):
    """An :class:`Outer` whose inputs are one-hot: ``activations`` holds the entries [b, P]."""

    entries: int = 0

    @property
    def inputs(self) -> int:
        return self.entries

    def formed(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return F.one_hot(self.activations[rows], self.entries).to(self.dtype)[:, None]

    def some_inputs(self, positions: slice) -> Tensor:
        return self.formed()[:, :, positions]

    def projected(self, basis: Tensor) -> Tensor:
        return basis[0][self.activations][:, None]

    def input_squares(self) -> Tensor:
        return self.output_grads.new_ones(self.output_grads.shape[:3])


@dataclass(frozen=True)
class Lookup(GradSample):
    """``g_i = sum_p e(id_ip) delta_ip^T`` with one-hot vectors e: an embedding table [V, E], layout ``(1, V, E)``.

    Attributes:
        ids: Looked-up entries [b, P].
        output_grads: Gradients of the layer's output [b, P, E].
        entries: Number of entries V.
    """

    ids: Tensor
    output_grads: Tensor
    entries: int

    @property
    def dtype(self) -> torch.dtype:
        return self.output_grads.dtype

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def layout(self) -> tuple[int, ...]:
        return (1, self.entries, self.output_grads.shape[-1])

    @property
    def units(self) -> tuple[int, ...]:
        return self.layout[2:]

    def by_row(self, count: int, consecutive: bool) -> Lookup:
        ids, output_grads = (of_rows(x, count, consecutive).flatten(1, 2) for x in (self.ids, self.output_grads))
        return Lookup(ids, output_grads, self.entries)

    def transposed(self) -> Entries:
        """The transposed gradients, whose units are those of the output gradients."""
        return Entries(self.ids, self.output_grads[:, None], entries=self.entries)

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([(u[0][self.ids] * self.output_grads).sum(1) for u in direction], 1) @ weights.T

    def low_rank_signals(self, left: Tensor, right: Tensor) -> Tensor:
        found = [(a[0][self.ids] * (self.output_grads @ b[0].mT)).sum((1, 2)) for a, b in zip(left, right, strict=True)]
        return torch.stack(found, 1)

    @property
    def positions(self) -> int:
        return self.ids.shape[1]

    def position_signals(self, direction: Tensor) -> Tensor:
        return torch.stack([(u[0][self.ids] * self.output_grads).sum(2) for u in direction], 2)

    def unit_energies(self, weights: Tensor) -> Tensor:
        return self.output_grads.square().sum(1) @ weights.T

    def gradient(self, rows: slice) -> Tensor:
        ids, output_grads = self.ids[rows], self.output_grads[rows]
        out = output_grads.new_zeros(ids.shape[0], self.entries, output_grads.shape[-1])
        out.scatter_add_(1, ids[..., None].expand_as(output_grads), output_grads)
        return out[:, None]

    def total(self) -> Tensor:
        out = self.output_grads.new_zeros(self.entries, self.output_grads.shape[-1])
        return out.index_add_(0, self.ids.flatten(), self.output_grads.flatten(0, 1))[None]

    def weighted(self, weights: Tensor) -> Lookup:
        return replace(self, output_grads=self.output_grads * weights[:, None, None])

    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        # the covariance of one-hot inputs is diagonal: the frequency of each entry
        counts = self.output_grads.new_zeros(self.entries).index_add_(
            0, self.ids.flatten(), self.output_grads.new_ones(self.ids.numel())
        )
        frequency = counts / self.ids.numel()
        return frequency[None], covariance(self.output_grads[:, None], full[1])

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Lookup:
        if left is not None:
            raise ValueError("Lookup.rotated: the left basis of an embedding is the identity; pass left=None.")
        return self if right is None else Lookup(self.ids, self.output_grads @ right, self.entries)

    def norms(self, weights: Tensor) -> Tensor:
        return torch.stack([self._norms(self.output_grads * weight[0].sqrt()[self.ids]) for weight in weights], 1)

    def squared_norms(self) -> Tensor:
        return self._norms(self.output_grads)

    def _norms(self, output_grads: Tensor) -> Tensor:
        # gradients of equal ids add up before they are squared: a sum over pairs of positions with the same entry
        same = (self.ids[:, :, None] == self.ids[:, None, :]).to(output_grads.dtype)
        return ((output_grads @ output_grads.transpose(1, 2)) * same).sum((1, 2))
