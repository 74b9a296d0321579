"""Per-row gradients of one parameter, held as the factors that the forward and backward pass left behind.

A record stands for the ``b`` per-row gradients of one use of a parameter without forming them. Its *layout* is the
parameter seen as a batch of matrices ``[G, O, I]`` (:class:`Outer`, :class:`Lookup`) or as a vector ``[D]``
(:class:`Vector`). All records answer the same five questions, so nothing else in the package asks for their kind.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ine_callback.capture.compressed_gradients import CompressedGradients

# Largest number of elements formed at once where per-row gradients have to be materialised (64 MB in float32).
CHUNK_ELEMENTS = 1 << 24

# Positions of a batch (rows x positions) that one look at the second moments takes; it takes every so manieth.
MAX_POSITIONS = 1 << 10


def row_chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices that cover ``rows`` rows so that a chunk of materialised gradients stays under ``CHUNK_ELEMENTS``."""
    size = max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def widened(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is; whole numbers as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


class GradSample(ABC):
    """The per-row gradients ``g`` of one use of one parameter (or of a weight joined with its bias)."""

    def wide(self) -> GradSample:
        """The same in float32 or better, which all questions need but those that say otherwise."""
        return self

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of rows b."""

    @property
    @abstractmethod
    def layout(self) -> tuple[int, ...]:
        """Shape of one row's gradient: ``(G, O, I)`` or ``(D,)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the gradients."""

    @property
    @abstractmethod
    def units(self) -> tuple[int, ...]:
        """The part of :attr:`layout` that counts output units: ``(G, O)``, ``(E,)`` or ``(D,)``."""

    @abstractmethod
    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        """Inner products by output unit, weighted: ``sum_o w_co <U_qo, g_io>`` [b, Q, C].

        Args:
            direction: Directions U [Q, *layout].
            weights: A weight for each unit, in C ways [C, units].
        """

    def signals(self, direction: Tensor) -> Tensor:
        """Inner products <U_q, g_i> [b, Q] with directions U [Q, *layout]."""
        return self.parts(direction, direction.new_ones(1, math.prod(self.units)))[..., 0]

    @abstractmethod
    def energies(self, weights: Tensor) -> Tensor:
        """Weighted squared gradients of output units [b, C], products of different positions left out.

        Args:
            weights: A weight for each unit, in C ways [C, units].
        """

    @abstractmethod
    def gradient(self, rows: slice) -> Tensor:
        """The materialised gradients of a slice of rows [len, *layout]."""

    @abstractmethod
    def total(self) -> Tensor:
        """The sum of all rows' gradients [*layout]: what autograd adds to the parameter's ``grad``."""

    @abstractmethod
    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        """Second moments whose Kronecker product approximates ``sum_i g_i g_i^T``, see :mod:`.kfac`.

        Args:
            full: Whether the left (output) and the right (input) moment is a matrix or only its diagonal.
            phase: In [0, 1): which positions are looked at where not all are.

        Returns:
            left ``[G, O, O]`` or ``[G, O]``, summed over rows and positions, and right ``[G, I, I]`` or ``[G, I]``,
            averaged over them. For a vector: left ``[D]`` (summed squares) and right the scalar 1.
        """

    @abstractmethod
    def rotated(self, left: Tensor | None, right: Tensor | None) -> GradSample:
        """The same gradients in the bases with columns ``left`` [G, O, O] and ``right`` [G, I, I] (None: as is)."""

    @abstractmethod
    def norms(self, weights: Tensor) -> Tensor:
        """``sum weight * g_i^2`` [b, C] with C elementwise weights [C, *layout]."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``|g_i|^2`` [b]."""


@dataclass(frozen=True)
class Outer(GradSample):
    """``g_i = sum_p delta_ip a_ip^T`` within each of G groups: linear layers, convolutions, everything like them.

    Factors may be as the pass left them, in bfloat16: a copy in float32 of all that a large network holds would cost
    more than all else. :meth:`wide` makes it; :meth:`parts`, :meth:`projected`, :meth:`compressed`, :meth:`covariances`
    and the inputs do without.

    Attributes:
        a: Inputs [b, G, P, I], P positions (1 without a sequence or space).
        delta: Output gradients [b, G, P, O].
        ones: Whether a last input of ones belongs to it, which is never stored: the bias.
    """

    a: Tensor
    delta: Tensor
    ones: bool = False

    def wide(self) -> Outer:
        a, delta = widened(self.a), widened(self.delta)
        return self if a is self.a and delta is self.delta else replace(self, a=a, delta=delta)

    @property
    def dtype(self) -> torch.dtype:
        return self.delta.dtype

    @property
    def rows(self) -> int:
        return self.delta.shape[0]

    @property
    def inputs(self) -> int:
        """I, with the input of ones."""
        return self.a.shape[3] + self.ones

    @property
    def layout(self) -> tuple[int, ...]:
        return (self.delta.shape[1], self.delta.shape[3], self.inputs)

    @property
    def units(self) -> tuple[int, ...]:
        return self.layout[:2]

    # -- the input side, which convolutions do not form ---------------------------------------------------------------

    def formed(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Inputs of some rows [len, G, P, I]."""
        return self._with_ones(self.a[rows])

    def projected(self, basis: Tensor) -> Tensor:
        """Inputs times a basis [G, I, K], as [b, G, P, K], in the inputs' precision."""
        basis = basis.to(self.a.dtype)
        if len(basis) == 1 and self.a.is_contiguous():  # one product for all rows
            flat, weight = self.a.flatten(0, 2), basis[0, : self.a.shape[3]]
            product = torch.addmm(basis[0, -1], flat, weight) if self.ones else flat @ weight
            return product.view(*self.a.shape[:3], -1)
        found: Tensor = self.a @ basis[:, : self.a.shape[3]]
        return found + basis[:, -1:] if self.ones else found

    def input_squares(self) -> Tensor:
        """Squared norms of the inputs [b, G, P]."""
        squares: Tensor = self.a.square().sum(3)
        return squares + 1.0 if self.ones else squares

    def some_inputs(self, positions: slice) -> Tensor:
        """Inputs at some positions [b, G, len, I]."""
        return self._with_ones(self.a[:, :, positions])

    def _with_ones(self, a: Tensor) -> Tensor:
        return torch.cat([a, a.new_ones(()).expand(*a.shape[:-1], 1)], -1) if self.ones else a

    # -- what records answer ------------------------------------------------------------------------------------------

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        queries, positions = direction.shape[0], self.delta.shape[2]
        if positions == 1 or (queries == 1 and self._inner_first):
            # never forms a gradient: contract the inputs first, then the output gradients
            inner = widened(self.projected(direction.permute(1, 3, 0, 2).flatten(2)))
            products = inner.reshape(*inner.shape[:3], queries, -1) * widened(self.delta)[:, :, :, None]
            units: Tensor = products[:, :, 0] if positions == 1 else products.sum(2)
            return units.transpose(1, 2).flatten(2) @ weights.T
        chunks = row_chunks(self.rows, direction[0].numel())
        return torch.cat([self._compressed(self.formed(s), s).parts(direction, weights) for s in chunks])

    @property
    def _inner_first(self) -> bool:
        """Whether [P, O] for each row is less than its gradient [O, I]."""
        return self.delta.shape[2] < self.inputs

    def energies(self, weights: Tensor) -> Tensor:
        squares = self.delta.square() @ weights.view(-1, *self.units).permute(1, 2, 0)  # [b, G, P, C]
        return (squares * self.input_squares()[..., None]).sum((1, 2))

    def gradient(self, rows: slice) -> Tensor:
        return self.delta[rows].transpose(-1, -2) @ self.formed(rows)

    def total(self) -> Tensor:
        return torch.einsum("bgpo,bgpi->goi", self.delta, self.formed())

    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        positions = self.delta.shape[2]
        every = min(positions, -(-self.rows * positions // MAX_POSITIONS))
        looked = slice(int(phase * every), None, every)
        delta, a = self.delta[:, :, looked], self.some_inputs(looked)
        left = _covariance(widened(delta), full[0]) * (positions / delta.shape[2])
        return left, _covariance(widened(a), full[1]) / (a.shape[0] * a.shape[2])

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Outer:
        delta = self.delta if left is None else self.delta @ left
        return replace(self, delta=delta) if right is None else Outer(self.projected(right), delta)

    def norms(self, weights: Tensor) -> Tensor:
        if self.delta.shape[2] == 1:
            a, delta = self.formed()[:, :, 0].square(), self.delta[:, :, 0].square()
            return (torch.einsum("bgo,cgoi->bcgi", delta, weights) * a[:, None]).sum((2, 3))
        flat = weights.flatten(1).T
        return torch.cat([self.gradient(s).square_().flatten(1) @ flat for s in row_chunks(self.rows, flat.shape[0])])

    def squared_norms(self) -> Tensor:
        if self.delta.shape[2] == 1:
            return (self.input_squares()[:, :, 0] * self.delta.square().sum((2, 3))).sum(1)
        chunks = row_chunks(self.rows, math.prod(self.layout))
        return torch.cat([self.gradient(s).square_().sum((1, 2, 3)) for s in chunks])

    def compressed(self, columns: Tensor) -> CompressedGradients:
        """The gradients times columns [G, I, k], in float32 or better; each is summed up in that precision too."""
        return self._compressed(self.projected(columns))

    def _compressed(self, inputs: Tensor, rows: slice = slice(None)) -> CompressedGradients:
        delta = self.delta[rows]
        return CompressedGradients(widened(inputs.to(delta.dtype).transpose(-1, -2) @ delta))

    def transposed(self) -> Outer:
        """The transposed gradients: units are inputs."""
        return Outer(self.delta, self.formed())

    def with_bias(self) -> Outer:
        """Weight and bias as one matrix whose last column is the bias (the homogeneous coordinate of K-FAC)."""
        return replace(self, ones=True)


@dataclass(frozen=True)
class Entries(Outer):
    """An :class:`Outer` whose inputs are one-hot: ``a`` holds the entries [b, P]."""

    entries: int = 0

    @property
    def inputs(self) -> int:
        return self.entries

    def formed(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return F.one_hot(self.a[rows], self.entries).to(self.dtype)[:, None]

    def some_inputs(self, positions: slice) -> Tensor:
        return self.formed()[:, :, positions]

    def projected(self, basis: Tensor) -> Tensor:
        return basis[0][self.a][:, None]

    def input_squares(self) -> Tensor:
        return self.delta.new_ones(self.delta.shape[:3])


@dataclass(frozen=True)
class Lookup(GradSample):
    """``g_i = sum_p e(id_ip) delta_ip^T``: an embedding table [V, E], layout ``(1, V, E)``.

    Attributes:
        ids: Looked-up entries [b, P].
        delta: Output gradients [b, P, E].
        entries: V.
    """

    ids: Tensor
    delta: Tensor
    entries: int

    @property
    def dtype(self) -> torch.dtype:
        return self.delta.dtype

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def layout(self) -> tuple[int, ...]:
        return (1, self.entries, self.delta.shape[-1])

    @property
    def units(self) -> tuple[int, ...]:
        return self.layout[2:]

    def transposed(self) -> Entries:
        """The transposed gradients: units are those of the output gradients."""
        return Entries(self.ids, self.delta[:, None], entries=self.entries)

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([(u[0][self.ids] * self.delta).sum(1) for u in direction], 1) @ weights.T

    def energies(self, weights: Tensor) -> Tensor:
        return self.delta.square().sum(1) @ weights.T

    def gradient(self, rows: slice) -> Tensor:
        ids, delta = self.ids[rows], self.delta[rows]
        out = delta.new_zeros(ids.shape[0], self.entries, delta.shape[-1])
        out.scatter_add_(1, ids[..., None].expand_as(delta), delta)
        return out[:, None]

    def total(self) -> Tensor:
        out = self.delta.new_zeros(self.entries, self.delta.shape[-1])
        return out.index_add_(0, self.ids.flatten(), self.delta.flatten(0, 1))[None]

    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        # one-hot inputs: their second moment is exactly diagonal, the frequency of each entry
        counts = self.delta.new_zeros(self.entries).index_add_(
            0, self.ids.flatten(), self.delta.new_ones(self.ids.numel())
        )
        frequency = counts / self.ids.numel()
        return frequency[None], _covariance(self.delta[:, None], full[1])

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Lookup:
        if left is not None:
            raise ValueError("Lookup.rotated: the left basis of an embedding is the identity; pass left=None.")
        return self if right is None else Lookup(self.ids, self.delta @ right, self.entries)

    def norms(self, weights: Tensor) -> Tensor:
        return torch.stack([self._norms(self.delta * weight[0].sqrt()[self.ids]) for weight in weights], 1)

    def squared_norms(self) -> Tensor:
        return self._norms(self.delta)

    def _norms(self, delta: Tensor) -> Tensor:
        # equal ids add up before squaring: sum over pairs of positions that looked up the same entry
        same = (self.ids[:, :, None] == self.ids[:, None, :]).to(delta.dtype)
        return ((delta @ delta.transpose(1, 2)) * same).sum((1, 2))


@dataclass(frozen=True)
class Vector(GradSample):
    """Materialised per-row gradients ``g`` [b, D]: norm weights, biases on their own, fallback layers."""

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

    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bd,qcd->bqc", self.g, direction[:, None] * weights)

    def energies(self, weights: Tensor) -> Tensor:
        return self.g.square() @ weights.T

    def gradient(self, rows: slice) -> Tensor:
        return self.g[rows]

    def total(self) -> Tensor:
        return self.g.sum(0)

    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.g.square().sum(0), self.g.new_ones(())

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Vector:
        return self

    def norms(self, weights: Tensor) -> Tensor:
        return self.g.square() @ weights.T

    def squared_norms(self) -> Tensor:
        return self.g.square().sum(1)


def _covariance(x: Tensor, full: bool) -> Tensor:
    """Second moment over rows and positions of x [b, G, P, K], as [G, K, K] or its diagonal [G, K]."""
    if full:
        flat = x.transpose(0, 1).flatten(1, 2)
        return flat.transpose(-1, -2) @ flat
    return x.square().sum((0, 2))
