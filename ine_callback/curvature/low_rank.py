"""Low-rank directions: <U, g> from a few combinations of a layer's inputs, without a product as large as the layer.

A layer's signal is ``sum_p delta_p^T U a_p``. With a basis R of r input dimensions and U ~ (U S R') R^T it is ``sum_p
delta_p^T (U S R') (R^T a_p)``: r / inputs of the work. The basis is best for what is measured, not for U itself: with
the curvature's moments A of inputs and B of output gradients a row's signal has, where they are independent, the
variance ``tr(U A U^T B)``, and the first r right singular vectors of ``B^(1/2) U A^(1/2)``, of all queries stacked,
keep the largest part of it. That part is the share kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_VARIANCE = 0.99  # share of the signals' variance that a basis must keep
TOP, MIXED, MAX_MIXTURES = (
    8,
    16,
    256,
)  # columns of a sketch: steepest eigenvectors, and least and most mixtures of others
NOISE = 0.1  # relative error of a row's self-influence in one visit that one block's mixtures may leave
RANK, MOST = 32, 256  # most dimensions of a basis: for each query, and in all
SMALLEST, WORTH = 32, 0.5  # sides of a layer with fewer dimensions, and bases of more than half of them, save nothing
SPARE, ROUNDS = 8, 3  # of the subspace iteration


@dataclass(frozen=True)
class Side:
    """Second moment of one side of a layer in its eigenbasis.

    Attributes:
        values: Eigenvalues [G, K], positive.
        vectors: Eigenvectors [G, K, K]; None: the moment is diagonal.
    """

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def drawn(cls, values: Tensor, vectors: Tensor | None, seen: float) -> Side:
        """A side whose values are drawn towards their mean, as few observations ask for.

        What ``seen`` vectors leave of a moment of effective dimension ``tr^2 / tr(square)`` is missing about that
        dimension divided by ``seen``.
        """
        mean = values.mean(-1, keepdim=True)
        # of a training that diverges they are too large to be squared
        relative = values / values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        dimension = relative.sum(-1, keepdim=True).square() / relative.square().sum(-1, keepdim=True).clamp_min(1e-30)
        weight = (dimension / max(1.0, seen)).clamp(1e-4, 1.0)
        return cls(values + weight * (mean - values) + 1e-30, vectors)

    def into(self, x: Tensor) -> Tensor:
        """x [..., G, n, K] in the eigenbasis."""
        return x if self.vectors is None else x @ self.vectors

    def out_of(self, x: Tensor) -> Tensor:
        """Columns x [G, K, n] of the eigenbasis in the original one."""
        return x if self.vectors is None else self.vectors @ x


def low_rank(u: Tensor, left: Side, right: Side, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """A basis of few input dimensions and the directions in it, or None where few would not do.

    Args:
        u: Directions [Q, G, O, I].
        left: Moment of the output gradients.
        right: Moment of the inputs.
        rank: Most dimensions for each query.

    Returns:
        basis [G, I, r], directions [Q, G, O, r] and the share kept (a scalar).
    """
    inputs = u.shape[-1]
    if inputs < SMALLEST:
        return None
    most = min(rank * u.shape[0], MOST, int(WORTH * inputs))
    in_basis = right.into(u) * right.values[:, None].sqrt()
    weighted = left.into(in_basis.transpose(-1, -2)) * left.values[:, None].sqrt()  # [Q, G, I, O]
    stacked = weighted.permute(1, 0, 3, 2).flatten(1, 2)  # [G, Q O, I]
    # vanishing gradients leave numbers whose squares single precision cannot hold
    stacked = stacked / stacked.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    values, vectors = _leading(stacked, most)
    total = stacked.square().sum((-1, -2))
    shares = values.clamp_min(0).cumsum(-1) / total.clamp_min(1e-30)[:, None]
    enough = (shares >= KEPT_VARIANCE).all(0)
    if not bool(enough.any()):
        return None
    r = int(enough.int().argmax()) + 1
    kept = vectors[..., :r]
    basis = right.out_of(kept * right.values[..., None].rsqrt())
    return basis, in_basis @ kept, shares[:, r - 1].min()


def _leading(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Squared leading singular values [G, most] and right singular vectors [G, I, most] of x [G, n, I].

    Subspace iteration (Halko, Martinsson and Tropp 2011) with a private start.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    size = min(most + SPARE, x.shape[-1], x.shape[-2])
    basis = torch.randn(x.shape[0], x.shape[-1], size, generator=generator, device=x.device, dtype=x.dtype)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(x.transpose(-1, -2) @ (x @ basis)).Q
    values, turn = torch.linalg.eigh((x @ basis).transpose(-1, -2) @ (x @ basis))
    return values.flip(-1)[..., :most], (basis @ turn).flip(-1)[..., :most]


@dataclass(frozen=True)
class Sketch:
    """Few columns for one side of a layer: its steepest eigenvectors, then random mixtures of all others.

    Attributes:
        side: The side.
        steepest: Indices of its steepest eigenvectors [G, TOP].
        factors: Squared factor [G, K] with which the others enter the mixtures, 0 for the steepest.
        mixed: Number of mixtures.
    """

    side: Side
    steepest: Tensor
    factors: Tensor
    mixed: int

    @classmethod
    def of(cls, side: Side, factors: Tensor, mixed: int) -> Sketch:
        """The sketch for squared factors [G, K]."""
        steepest = side.values.topk(TOP, -1).indices
        return cls(side, steepest, factors.scatter(-1, steepest, 0.0), mixed)

    def draw(self, generator: torch.Generator) -> Tensor:
        """New mixtures: columns [G, K, TOP + mixed]."""
        shape = (*self.factors.shape, self.mixed)
        signs = torch.randint(2, shape, generator=generator, device=generator.device).to(self.factors) * 2.0 - 1.0
        mixtures = signs * (self.factors / self.mixed).sqrt()[..., None]
        first = torch.zeros_like(mixtures[..., :1]).expand(-1, -1, TOP).scatter(1, self.steepest[:, None], 1.0)
        return self.side.out_of(torch.cat([first, mixtures], -1))

    @property
    def scales(self) -> Tensor:
        """Squared factor [G, K] of every eigenvector in its cell's columns."""
        return self.factors.scatter(-1, self.steepest, 1.0)

    def cells(self, x: Tensor) -> Tensor:
        """x [..., G, n, K] summed over the eigenvectors of each cell: the steepest, one each, and all others."""
        member = torch.zeros_like(self.factors)[..., None].expand(-1, -1, TOP).scatter(1, self.steepest[:, None], 1.0)
        return x @ torch.cat([member, 1.0 - member.sum(-1, keepdim=True)], -1)

    def spread(self, x: Tensor) -> Tensor:
        """Values of cells [..., TOP + 1] as values of columns."""
        return torch.cat([x[..., :-1], x[..., -1:].expand(*x.shape[:-1], self.mixed)], -1)


def energies(weight: Tensor, left: Side, right: Side) -> Tensor:
    """A row's expected ``<D g, g>`` under the moments [2]: all of it, and what a sketch meets by mixtures.

    Args:
        weight: D's weights in the eigenbases [G, O, I].
        left: Moment of the output gradients.
        right: Moment of the inputs.
    """
    wanted = weight * left.values[..., :, None] * right.values[..., None, :]
    steepest = [
        torch.zeros_like(side.values).scatter(-1, side.values.topk(TOP, -1).indices, 1.0)
        if side.values.shape[-1] >= 2 * (TOP + MIXED)
        else torch.ones_like(side.values)
        for side in (left, right)
    ]
    met = torch.einsum("goi,go,gi->", wanted, *steepest)
    return torch.stack([wanted.sum(), wanted.sum() - met])


def mixtures(share: float) -> int:
    """How many mixtures a block needs whose mixtures meet that share of a row's self-influence.

    m mixtures of each side leave the relative variance ``2 / m + 2 / m`` of what they meet.

    Example:
        >>> mixtures(0.1), mixtures(0.5), mixtures(1.0)
        (16, 104, 256)
    """
    if not math.isfinite(share):  # the training diverges
        return MIXED
    needed = math.ceil(4 * share**2 / NOISE**2 / 8) * 8
    return min(max(needed, MIXED), MAX_MIXTURES)


def sketched(weight: Tensor, left: Side, right: Side, mixed: int) -> tuple[Sketch | None, Sketch | None, Tensor]:
    """Sketches of both sides and weights [2, G, n, m] of squares in their columns.

    The weighted sums of squares are nearly ``sum weight g^2`` and ``sum weight^2 g^2``: steepest eigenvectors keep
    their weights; the others, which are many and whose weights are much alike, are met by their random mixtures. The
    weights make the expectation under the moments exact in each cell. A side of few dimensions stays as it is (None).

    Args:
        weight: D's weights in the eigenbases [G, O, I].
        left: Moment of the output gradients.
        right: Moment of the inputs.
        mixed: Number of mixtures of each side.
    """
    energy = left.values[..., :, None] * right.values[..., None, :]
    wanted = weight * energy
    rows, columns = (
        Sketch.of(side, wanted.sum(along) / energy.sum(along), mixed)
        if side.values.shape[-1] >= 2 * (TOP + mixed)
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
