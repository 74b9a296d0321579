"""Low-rank directions: <U, g> from a few combinations of a layer's inputs, without a product as large as the layer.

A layer's signal is ``sum_p e_p^T U a_p`` over positions p, with activations a and output gradients e. A basis R of r
input dimensions with ``U ~ V R^T`` makes it ``sum_p e_p^T V (R^T a_p)``: r / inputs of the work.

The basis is best for the signals, not for U itself. Let A and B be the covariances of activations and output gradients.
Where the two are independent, a row's signal has the variance ``tr(U A U^T B)``. The first r right singular vectors of
``B^(1/2) U A^(1/2)``, of all queries stacked, retain the largest part of it: the retained variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 128  # default: most dimensions of a basis for each query
FORCED_RANK = 32  # likewise where directions are of low rank whatever they retain: memory decides
MAX_RANK, MAX_FRACTION = 256, 0.5  # most dimensions for all queries, also as a fraction of the exact directions' work
MIN_RETAINED_VARIANCE = 0.99  # fraction of the signals' variance that a basis must retain
MIN_INPUTS = 32  # sides with fewer dimensions save nothing
OVERSAMPLING, POWER_ITERATIONS = 8, 3  # of the subspace iteration


@dataclass(frozen=True)
class Side:
    """Covariance of one side of a layer (output gradients on the left, activations on the right) in its eigenbasis.

    Attributes:
        values: Eigenvalues [G, K], positive.
        vectors: Eigenvectors [G, K, K]; None: the covariance is diagonal.
    """

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def shrunk(cls, values: Tensor, vectors: Tensor | None, seen: float) -> Side:
        """A side whose eigenvalues are shrunk towards their mean: the more, the fewer vectors were observed.

        A covariance C of ``seen`` vectors has the relative error d / seen, with the effective dimension
        ``d = tr(C)^2 / tr(C^2)``.
        """
        mean = values.mean(-1, keepdim=True)
        # a diverging training has values too large to be squared
        relative = values / values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        dimension = relative.sum(-1, keepdim=True).square() / relative.square().sum(-1, keepdim=True).clamp_min(1e-30)
        weight = (dimension / max(1.0, seen)).clamp(1e-4, 1.0)
        return cls(values + weight * (mean - values) + 1e-30, vectors)

    @property
    def columns(self) -> Tensor:
        """The eigenvectors [G, K, K], also of a diagonal covariance."""
        if self.vectors is not None:
            return self.vectors
        return torch.eye(self.values.shape[-1], device=self.values.device).expand(len(self.values), -1, -1)

    def into(self, x: Tensor) -> Tensor:
        """x [..., G, n, K] in the eigenbasis."""
        return x if self.vectors is None else x @ self.vectors

    def out_of(self, x: Tensor) -> Tensor:
        """Columns x [G, K, n] of the eigenbasis in the original one."""
        return x if self.vectors is None else self.vectors @ x


def low_rank(
    u: Tensor, left: Side, right: Side, rank: int, forced: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A basis of few input dimensions and the directions in it; None where few dimensions retain too little.

    Args:
        u: Directions [Q, G, O, I].
        left: Covariance of the output gradients.
        right: Covariance of the activations.
        rank: Most dimensions for each query.
        forced: Whether to take some where they retain too little, since the directions themselves would not fit.

    Returns:
        basis [G, I, r], directions [Q, G, O, r] and the retained variance (a scalar fraction).
    """
    inputs = u.shape[-1]
    most = _most(u, rank, forced)
    if inputs < MIN_INPUTS or most < 1:
        return None
    in_basis = right.into(u) * right.values[:, None].sqrt()
    weighted = left.into(in_basis.transpose(-1, -2)) * left.values[:, None].sqrt()  # [Q, G, I, O]
    stacked = weighted.permute(1, 0, 3, 2).flatten(1, 2)  # [G, Q O, I]
    # squares of vanishing gradients underflow in single precision
    stacked = stacked / stacked.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    values, vectors = _leading(stacked, most)
    total = stacked.square().sum((-1, -2))
    retained = values.clamp_min(0).cumsum(-1) / total.clamp_min(1e-30)[:, None]
    enough = (retained >= MIN_RETAINED_VARIANCE).all(0)
    if not bool(enough.any()):
        if not forced:
            return None
        enough[-1] = True
    r = int(enough.int().argmax()) + 1
    leading = vectors[..., :r]
    basis = right.out_of(leading * right.values[..., None].rsqrt())
    return basis, in_basis @ leading, retained[:, r - 1].min()


def _most(u: Tensor, rank: int, forced: bool) -> int:
    """Most dimensions r of a basis for directions u [Q, G, O, I]: a position's work is r I + Q r O in place of Q O I.

    Example:
        >>> _most(torch.zeros(1, 1, 3072, 768), 128, False), _most(torch.zeros(1, 1, 128, 128), 128, False)
        (128, 32)
    """
    queries, _, outputs, inputs = u.shape
    if forced:
        return min(min(rank, FORCED_RANK) * queries, MAX_RANK, int(MAX_FRACTION * inputs))
    outputs *= queries
    return min(rank * queries, MAX_RANK, int(MAX_FRACTION * outputs * inputs / (outputs + inputs)))


def _leading(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Squared leading singular values [G, most] and right singular vectors [G, I, most] of x [G, n, I].

    Subspace iteration (Halko, Martinsson and Tropp 2011) with a private random start.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    size = min(most + OVERSAMPLING, x.shape[-1], x.shape[-2])
    basis = torch.randn(x.shape[0], x.shape[-1], size, generator=generator, device=x.device, dtype=x.dtype)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(x.transpose(-1, -2) @ (x @ basis)).Q
    values, rotation = torch.linalg.eigh((x @ basis).transpose(-1, -2) @ (x @ basis))
    return values.flip(-1)[..., :most], (basis @ rotation).flip(-1)[..., :most]
