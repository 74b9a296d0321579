"""Low-rank directions: <U, g> from a few combinations of a layer's inputs, without a product as large as the layer.

A layer's signal is ``sum_p delta_p^T U a_p``. With a basis R of r input dimensions and U ~ (U S R') R^T it is ``sum_p
delta_p^T (U S R') (R^T a_p)``: r / inputs of the work. The basis is best for what is measured, not for U itself: with
the curvature's moments A of inputs and B of output gradients a row's signal has, where they are independent, the
variance ``tr(U A U^T B)``, and the first r right singular vectors of ``B^(1/2) U A^(1/2)``, of all queries stacked,
keep the largest part of it. That part is the share kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 0.99  # share of the signals' variance that a basis must keep
RANK = 32  # most dimensions of a basis
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
        dimension = values.sum(-1, keepdim=True).square() / values.square().sum(-1, keepdim=True).clamp_min(1e-30)
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
        rank: Most dimensions.

    Returns:
        basis [G, I, r], directions [Q, G, O, r] and the share kept (a scalar).
    """
    inputs = u.shape[-1]
    if inputs < SMALLEST:
        return None
    most = min(rank, int(WORTH * inputs))
    in_basis = right.into(u) * right.values[:, None].sqrt()
    weighted = left.into(in_basis.transpose(-1, -2)) * left.values[:, None].sqrt()  # [Q, G, I, O]
    stacked = weighted.permute(1, 0, 3, 2).flatten(1, 2)  # [G, Q O, I]
    values, vectors = _leading(stacked, most)
    total = stacked.square().sum((-1, -2))
    shares = values.clamp_min(0).cumsum(-1) / total.clamp_min(1e-30)[:, None]
    enough = (shares >= KEPT).all(0)
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


def heaviest(energy: Tensor) -> Tensor | None:
    """Indices [G, r] of the entries of an energy [G, K] that hold nearly all of it, or None where they are many."""
    if energy.shape[-1] < SMALLEST:
        return None
    values, order = energy.sort(-1, descending=True)
    shares = values.cumsum(-1) / values.sum(-1, keepdim=True).clamp_min(1e-30)
    r = int((shares < 1 - (1 - KEPT) / 2).sum(-1).max()) + 1
    return order[..., :r] if r <= WORTH * energy.shape[-1] else None
