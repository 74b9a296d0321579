"""Sketches: self-influence ``<D g, g>`` from few columns of a layer's sides, its gradient never formed in full.

A sketch of a side has its steepest eigenvectors as columns, one each. All others, which are many, enter random
mixtures: each of them those of its stratum, the eigenvectors with much the same weight in D. A stratum has one weight,
so what a row has of it counts as it does on average. With a single stratum frequent and rare words counted alike.

How much of a score is their noise is measured on the way. A side's mixtures are independent draws, so the part T of the
estimate that is in them is a sum of two halves with one distribution, and ``E[(T_1 - T_2)^2] = Var(T_1 + T_2)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ine_callback.curvature.low_rank import Side

STEEPEST = 8  # eigenvectors that are columns of their own
MIN_MIXTURES, MAX_MIXTURES = 16, 256  # multiples of 2 STRATA: each stratum has as many, in two halves
STRATA = 4
HALVES = 2  # differences between halves of the mixtures: of the left and of the right side
MAX_ERROR = 0.1  # relative error of a row's self-influence in one step that one block's mixtures may leave


@dataclass(frozen=True)
class Sketch:
    """Few columns for one side of a layer: its steepest eigenvectors, then random mixtures of all others.

    Attributes:
        side: The side.
        steepest: Indices of its steepest eigenvectors [G, STEEPEST].
        factors: Squared factor [G, K] with which the others enter the mixtures, 0 for the steepest.
        count: Number of mixtures.
        member: Which stratum's mixtures each of the others enters [G, K, STRATA], one-hot; 0 for the steepest.
    """

    side: Side
    steepest: Tensor
    factors: Tensor
    count: int
    member: Tensor

    @classmethod
    def of(cls, side: Side, factors: Tensor, count: int) -> Sketch:
        """The sketch for squared factors [G, K]."""
        steepest = side.values.topk(STEEPEST, -1).indices
        factors = factors.scatter(-1, steepest, 0.0)
        member = _strata(factors, factors * side.values)
        return cls(side, steepest, factors, count, member.scatter(1, steepest[..., None].expand(-1, -1, STRATA), 0.0))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Columns [G, K, STEEPEST + count] with new random mixtures."""
        each = self.count // STRATA
        shape = (*self.factors.shape, each)
        signs = torch.randint(2, shape, generator=generator, device=generator.device).to(self.factors) * 2.0 - 1.0
        scaled = signs * (self.factors / each).sqrt()[..., None]
        mixtures = (self.member[..., None] * scaled[..., None, :]).flatten(2)
        first = torch.zeros_like(mixtures[..., :1]).expand(-1, -1, STEEPEST).scatter(1, self.steepest[:, None], 1.0)
        return self.side.out_of(torch.cat([first, mixtures], -1))

    @property
    def halves(self) -> Tensor:
        """Signs of the columns [STEEPEST + count]: 1 and -1 for the two halves of the mixtures, 0 for the others."""
        signs = self.factors.new_ones(STRATA, self.count // STRATA)
        signs[:, signs.shape[1] // 2 :] = -1.0
        return torch.cat([self.factors.new_zeros(STEEPEST), signs.flatten()])

    @property
    def scales(self) -> Tensor:
        """Squared factor [G, K] of every eigenvector in the columns of its cell, see :meth:`cells`."""
        return self.factors.scatter(-1, self.steepest, 1.0)

    def cells(self, x: Tensor) -> Tensor:
        """x [..., G, n, K] summed over the eigenvectors of each cell: the steepest, one each, and the strata."""
        first = torch.zeros_like(self.factors)[..., None].expand(-1, -1, STEEPEST)
        return x @ torch.cat([first.scatter(1, self.steepest[:, None], 1.0), self.member], -1)

    def spread(self, x: Tensor) -> Tensor:
        """Values of cells [..., STEEPEST + STRATA] as values of columns."""
        each = self.count // STRATA
        return torch.cat([x[..., :STEEPEST], x[..., STEEPEST:].repeat_interleave(each, -1)], -1)


def _strata(factors: Tensor, energies: Tensor) -> Tensor:
    """Strata of much the same factor, each with much the same part of the energy [G, K, STRATA], one-hot."""
    order = factors.argsort(-1, descending=True)
    ordered = energies.gather(-1, order)
    below = ordered.cumsum(-1) - ordered / 2
    place = below / ordered.sum(-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny) * STRATA
    place = place.nan_to_num(0.0).long().clamp(0, STRATA - 1)  # NaN where the training diverges
    found = torch.zeros_like(place).scatter(-1, order, place)
    return F.one_hot(found, STRATA).to(factors)


def expected_self_influence(weight: Tensor, left: Side, right: Side) -> Tensor:
    """A row's expected ``<D g, g>`` under the covariances [2]: all of it, and the part that a sketch has in mixtures.

    Args:
        weight: D's weights in the eigenbases [G, O, I].
        left: Covariance of the output gradients.
        right: Covariance of the activations.
    """
    wanted = weight * left.values[..., :, None] * right.values[..., None, :]
    steepest = [
        torch.zeros_like(side.values).scatter(-1, side.values.topk(STEEPEST, -1).indices, 1.0)
        if side.values.shape[-1] >= 2 * (STEEPEST + MIN_MIXTURES)
        else torch.ones_like(side.values)
        for side in (left, right)
    ]
    exact = torch.einsum("goi,go,gi->", wanted, *steepest)
    return torch.stack([wanted.sum(), wanted.sum() - exact])


def mixtures(fraction: float) -> int:
    """How many mixtures a block needs whose mixtures estimate that fraction of a row's self-influence.

    m mixtures of each side leave the relative variance ``2 / m + 2 / m`` in what they estimate.

    Example:
        >>> mixtures(0.1), mixtures(0.5), mixtures(1.0)
        (16, 104, 256)
    """
    if not math.isfinite(fraction):  # the training diverges
        return MIN_MIXTURES
    needed = math.ceil(4 * fraction**2 / MAX_ERROR**2 / 8) * 8
    return min(max(needed, MIN_MIXTURES), MAX_MIXTURES)


def sketched(weight: Tensor, left: Side, right: Side, count: int) -> tuple[Sketch | None, Sketch | None, Tensor]:
    """Sketches of both sides and weights [2, G, n, m] of squares in their columns.

    The weighted sums of squares approximate ``sum weight g^2`` and ``sum weight^2 g^2``. The steepest eigenvectors have
    their own weights. The mixtures' weights make the expectation under the covariances exact in each cell. A side of
    few dimensions is not sketched (None).

    Args:
        weight: D's weights in the eigenbases [G, O, I].
        left: Covariance of the output gradients.
        right: Covariance of the activations.
        count: Number of mixtures of each side.
    """
    energy = left.values[..., :, None] * right.values[..., None, :]
    wanted = weight * energy
    rows, columns = (
        Sketch.of(side, wanted.sum(along) / energy.sum(along), count)
        if side.values.shape[-1] >= 2 * (STEEPEST + count)
        else None
        for side, along in ((left, -1), (right, -2))
    )

    def cells(x: Tensor) -> Tensor:
        x = x if columns is None else columns.cells(x)
        return x if rows is None else rows.cells(x.transpose(-1, -2)).transpose(-1, -2)

    scaled = energy if rows is None else energy * rows.scales[..., :, None]
    scaled = scaled if columns is None else scaled * columns.scales[..., None, :]
    found = cells(torch.stack([wanted, weight * wanted])) / cells(scaled).clamp_min(1e-30)
    found = found if columns is None else columns.spread(found)
    return rows, columns, found if rows is None else rows.spread(found.transpose(-1, -2)).transpose(-1, -2)
