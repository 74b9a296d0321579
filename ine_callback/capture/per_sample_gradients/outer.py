"""Gradients that are sums of outer products: linear layers, convolutions and everything like them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ine_callback.capture.per_sample_gradients.base import (
    GradSample,
    covariance,
    of_rows,
    row_chunks,
    wide_sum,
    widened,
)
from ine_callback.capture.per_sample_gradients.compressed import CompressedGradients

# Positions of a batch (rows x positions) in one curvature update; of more, every k-th is taken.
MAX_POSITIONS = 1 << 10


@dataclass(frozen=True)
class Outer(GradSample):
    """``g_i = sum_p delta_ip a_ip^T`` with output gradients delta and activations a, within each of G groups.

    Factors stay in the dtype of the pass, e.g. bfloat16: float32 copies for a large network would cost more than
    everything else. :meth:`wide` makes such a copy. :meth:`parts`, :meth:`projected`, :meth:`compressed`,
    :meth:`covariances` and the methods that return inputs do not need it.

    Attributes:
        activations: The layer's inputs [b, G, P, I], P positions (1 without a sequence or space).
        output_grads: Gradients of the layer's output [b, G, P, O].
        ones: Whether there is a last input of ones (the bias). It is never stored.
    """

    activations: Tensor
    output_grads: Tensor
    ones: bool = False

    def wide(self) -> Outer:
        activations, output_grads = widened(self.activations), widened(self.output_grads)
        if activations is self.activations and output_grads is self.output_grads:
            return self
        return replace(self, activations=activations, output_grads=output_grads)

    @property
    def dtype(self) -> torch.dtype:
        return self.output_grads.dtype

    @property
    def rows(self) -> int:
        return self.output_grads.shape[0]

    @property
    def inputs(self) -> int:
        """Number of inputs I, with the input of ones."""
        return self.activations.shape[3] + self.ones

    @property
    def layout(self) -> tuple[int, ...]:
        return (self.output_grads.shape[1], self.output_grads.shape[3], self.inputs)

    def by_row(self, count: int, consecutive: bool) -> Outer | None:
        if type(self) is not Outer:  # inputs of other classes are no positions
            return None
        both = (of_rows(x, count, consecutive).transpose(1, 2) for x in (self.activations, self.output_grads))
        activations, output_grads = (x.flatten(2, 3) for x in both)
        return Outer(activations, output_grads, self.ones)

    @property
    def units(self) -> tuple[int, ...]:
        return self.layout[:2]

    # -- the inputs, which subclasses do not store -------------------------------------------------------------------

    def formed(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Inputs of some rows [len, G, P, I]."""
        return self._with_ones(self.activations[rows])

    def projected(self, basis: Tensor) -> Tensor:
        """Inputs times a basis [G, I, K], as [b, G, P, K], in the inputs' precision."""
        basis = basis.to(self.activations.dtype)
        if len(basis) == 1 and self.activations.is_contiguous():  # one product for all rows
            flat, weight = self.activations.flatten(0, 2), basis[0, : self.activations.shape[3]]
            product = torch.addmm(basis[0, -1], flat, weight) if self.ones else flat @ weight
            return product.view(*self.activations.shape[:3], product.shape[-1])
        found: Tensor = self.activations @ basis[:, : self.activations.shape[3]]
        return found + basis[:, -1:] if self.ones else found

    def input_squares(self) -> Tensor:
        """Squared norms of the inputs [b, G, P]."""
        squares: Tensor = self.activations.square().sum(3)
        return squares + 1.0 if self.ones else squares

    def some_inputs(self, positions: slice) -> Tensor:
        """Inputs at some positions [b, G, len, I]."""
        return self._with_ones(self.activations[:, :, positions])

    def _with_ones(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(()).expand(*x.shape[:-1], 1)], -1) if self.ones else x

    # -- the methods of every GradSample -----------------------------------------------------------------------------

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        queries, positions = direction.shape[0], self.output_grads.shape[2]
        if positions == 1 or (queries == 1 and self._inner_first):
            # no gradient is formed: contracts the inputs first, then the output gradients
            inner = self.projected(direction.permute(1, 3, 0, 2).flatten(2)).unflatten(-1, (queries, -1))
            if positions == 1:
                units: Tensor = (widened(inner) * widened(self.output_grads)[:, :, :, None])[:, :, 0]
            else:  # products keep the pass's precision, and no float32 copy is made of either; sums do not
                products = inner * self.output_grads[:, :, :, None]
                units = wide_sum(products, 2)
            return units.transpose(1, 2).flatten(2) @ weights.T
        chunks = row_chunks(len(self.output_grads), direction[0].numel())  # entries, which need not be rows
        return torch.cat([self._compressed(self.formed(s), s).parts(direction, weights) for s in chunks])

    def low_rank_signals(self, left: Tensor, right: Tensor) -> Tensor:
        queries, groups, _, rank = left.shape
        inner = self.projected(right.permute(1, 3, 0, 2).reshape(groups, -1, queries * rank))  # [b, G, P, Q r]
        outer = self.output_grads @ left.permute(1, 2, 0, 3).reshape(groups, -1, queries * rank)
        found: Tensor = (inner * outer).sum((1, 2)).unflatten(1, (queries, rank)).sum(2)
        return found

    @property
    def positions(self) -> int:
        return self.output_grads.shape[2]

    def position_signals(self, direction: Tensor) -> Tensor:
        inputs = self.formed()
        found = [((inputs @ u.transpose(-1, -2)) * self.output_grads).sum((1, 3)) for u in direction]
        return torch.stack(found, 2)

    @property
    def _inner_first(self) -> bool:
        """Whether a row's [P, O] is smaller than its gradient [O, I]."""
        return self.output_grads.shape[2] < self.inputs

    def unit_energies(self, weights: Tensor) -> Tensor:
        squares = self.output_grads.square() @ weights.view(-1, *self.units).permute(1, 2, 0)  # [b, G, P, C]
        return (squares * self.input_squares()[..., None]).sum((1, 2))

    def gradient(self, rows: slice) -> Tensor:
        return self.output_grads[rows].transpose(-1, -2) @ self.formed(rows)

    def total(self) -> Tensor:
        return torch.einsum("bgpo,bgpi->goi", self.output_grads, self.formed())

    def weighted(self, weights: Tensor) -> Outer:
        return replace(self, output_grads=self.output_grads * weights[:, None, None, None])

    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        positions = self.output_grads.shape[2]
        interval = min(positions, -(-len(self.output_grads) * positions // MAX_POSITIONS))
        sampled = slice(int(phase * interval), None, interval)
        output_grads, inputs = self.output_grads[:, :, sampled], self.some_inputs(sampled)
        left = covariance(widened(output_grads), full[0]) * (positions / output_grads.shape[2])
        return left, covariance(widened(inputs), full[1]) / (inputs.shape[0] * inputs.shape[2])

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Outer:
        output_grads = self.output_grads if left is None else self.output_grads @ left
        return replace(self, output_grads=output_grads) if right is None else Outer(self.projected(right), output_grads)

    def norms(self, weights: Tensor) -> Tensor:
        if self.output_grads.shape[2] == 1:
            inputs, output_grads = self.formed()[:, :, 0].square(), self.output_grads[:, :, 0].square()
            return (torch.einsum("bgo,cgoi->bcgi", output_grads, weights) * inputs[:, None]).sum((2, 3))
        flat = weights.flatten(1).T
        return torch.cat([self.gradient(s).square_().flatten(1) @ flat for s in row_chunks(self.rows, flat.shape[0])])

    def squared_norms(self) -> Tensor:
        if self.output_grads.shape[2] == 1:
            return (self.input_squares()[:, :, 0] * self.output_grads.square().sum((2, 3))).sum(1)
        chunks = row_chunks(self.rows, math.prod(self.layout))
        return torch.cat([self.gradient(s).square_().sum((1, 2, 3)) for s in chunks])

    def compressed(self, columns: Tensor) -> CompressedGradients:
        """The gradients times columns [G, I, k], in float32 or better."""
        return self._compressed(self.projected(columns))

    def _compressed(self, inputs: Tensor, rows: slice = slice(None)) -> CompressedGradients:
        output_grads = self.output_grads[rows]
        return CompressedGradients(widened(inputs.to(output_grads.dtype).transpose(-1, -2) @ output_grads))

    def transposed(self) -> Outer:
        """The transposed gradients, whose units are the inputs."""
        return Outer(self.output_grads, self.formed())

    def with_bias(self) -> Outer:
        """Weight and bias as one matrix whose last column is the bias (the homogeneous coordinate of K-FAC)."""
        if type(self) is Outer:  # what is made in every step, without looking for the fields of a subclass
            return Outer(self.activations, self.output_grads, ones=True)
        return replace(self, ones=True)
