"""What every kind of per-sample gradient can compute, and what the kinds have in common.

A :class:`GradSample` stands for the gradients of ``b`` rows by one use of a parameter, without forming them. Its
*layout* is the parameter seen as a batch of matrices ``[G, O, I]`` (:class:`~.Outer`, :class:`~.Lookup`) or as a vector
``[D]`` (:class:`~.Vector`). All kinds have the same methods, so the rest of the package rarely asks for the kind.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

# Largest number of elements formed at once where per-sample gradients must be materialised (64 MB in float32).
CHUNK_ELEMENTS = 1 << 24


def row_chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices that cover ``rows`` rows so that a chunk of materialised gradients stays under ``CHUNK_ELEMENTS``."""
    size = max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is; integers stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def wide_sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum over dimensions in float32 or better, without a copy of x in that precision."""
    return x.sum(dim, dtype=torch.promote_types(x.dtype, torch.float32))


def of_rows(x: Tensor, count: int, consecutive: bool) -> Tensor:
    """Entries [b count, ...] as [b, count, ...], see :meth:`GradSample.by_row`."""
    by_row: Tensor = x.unflatten(0, (-1, count)) if consecutive else x.unflatten(0, (count, -1)).transpose(0, 1)
    return by_row


def covariance(x: Tensor, full: bool) -> Tensor:
    """Second moment over rows and positions of x [b, G, P, K], as [G, K, K] or its diagonal [G, K]."""
    if full:
        flat = x.transpose(0, 1).flatten(1, 2)
        return flat.transpose(-1, -2) @ flat
    return x.square().sum((0, 2))


class GradSample(ABC):
    """The per-sample gradients ``g`` of one use of one parameter (or of a weight joined with its bias)."""

    def wide(self) -> GradSample:
        """The same in float32 or better. All methods need that, except where a class says otherwise."""
        return self

    def copied(self) -> GradSample:
        """The same in memory of its own."""
        return self._with(Tensor.clone)

    def moved(self, device: torch.device) -> GradSample:
        """The same on a device."""
        return self._with(lambda t: t.to(device))

    def _with(self, function: Callable[[Tensor], Tensor]) -> GradSample:
        held = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        tensors = {name: function(t) for name, t in held.items() if isinstance(t, Tensor)}
        found: GradSample = replace(self, **tensors)  # type: ignore[type-var]
        return found

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
        """Dtype of the gradients."""

    @property
    @abstractmethod
    def units(self) -> tuple[int, ...]:
        """The part of :attr:`layout` that counts output units: ``(G, O)``, ``(E,)`` or ``(D,)``."""

    @abstractmethod
    def parts(self, direction: Tensor, weights: Tensor) -> Tensor:
        """Inner products by output unit, weighted: ``sum_o w_co <U_qo, g_io>`` [b, Q, C].

        Args:
            direction: Directions U [Q, *layout].
            weights: C weights for each unit [C, units].
        """

    def signals(self, direction: Tensor) -> Tensor:
        """Inner products <U_q, g_i> [b, Q] with directions U [Q, *layout]."""
        return self.parts(direction, direction.new_ones(1, math.prod(self.units)))[..., 0]

    def low_rank_signals(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products [b, Q] with directions ``left right`` of rank r: left [Q, G, O, r], right [Q, G, r, I]."""
        return self.signals(left @ right)

    @property
    def positions(self) -> int | None:
        """Number of positions P; None where gradients have lost them."""
        return None

    def position_signals(self, direction: Tensor) -> Tensor | None:
        """The parts of :meth:`signals` by position [b, P, Q]; None where gradients have lost their positions."""
        return None

    @abstractmethod
    def unit_energies(self, weights: Tensor) -> Tensor:
        """Weighted squared gradients of output units [b, C], without products of different positions.

        Args:
            weights: C weights for each unit [C, units].
        """

    @abstractmethod
    def gradient(self, rows: slice) -> Tensor:
        """The materialised gradients of a slice of rows [len, *layout]."""

    @abstractmethod
    def total(self) -> Tensor:
        """The sum of all rows' gradients [*layout]: what autograd adds to the parameter's ``grad``."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> GradSample:
        """The rows' gradients times one weight each [b]."""

    def by_row(self, count: int, consecutive: bool) -> GradSample | None:
        """The rows' gradients, of entries of which each row has ``count``; None: see :meth:`split`.

        Args:
            count: Entries of a row.
            consecutive: Whether a row's entries follow one another; else all rows' first ones come first.
        """
        return None

    def split(self, count: int, consecutive: bool) -> list[GradSample]:
        """The same as gradients of each entry, with b rows each, which add up to the rows'."""
        held = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        tensors = {n: of_rows(t, count, consecutive) for n, t in held.items() if isinstance(t, Tensor)}
        parts = [{name: t[:, k] for name, t in tensors.items()} for k in range(count)]
        return [replace(self, **part) for part in parts]  # type: ignore[type-var]

    def weighted_sums(self, weights: Tensor) -> Tensor:
        """Sums of the rows' gradients [Q, *layout] with Q weights for each row [b, Q]."""
        return torch.stack([self.weighted(column).total() for column in weights.unbind(1)])

    @abstractmethod
    def covariances(self, full: tuple[bool, bool], phase: float = 0.0) -> tuple[Tensor, Tensor]:
        """Covariances whose Kronecker product approximates ``sum_i g_i g_i^T`` (K-FAC's factors).

        Args:
            full: Whether the left (output) and the right (input) covariance is a matrix or only its diagonal.
            phase: In [0, 1): which positions are sampled where not all are.

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
