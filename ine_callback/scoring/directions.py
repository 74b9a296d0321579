"""What a refresh leaves for one block: how a record is contracted with every query's U and with its own discount D.

Self-influence is discounted by K-FAC alone: the reservoir's discount would need each row's own projections.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Lookup, Outer, Vector
from ine_callback.capture.per_sample_gradients import CompressedGradients, widened
from ine_callback.capture.per_sample_gradients.compressed import MAX_WEIGHTED_QUERIES, weighted_columns
from ine_callback.curvature.low_rank import SMALLEST, low_rank
from ine_callback.curvature.spectral import Sketched, SpectralOperator
from ine_callback.scoring.sign_contrasts import Contrasts, summed

WHOLE = 1 << 16  # entries up to which the gradient of a shared block is formed for each row

Use = GradSample | CompressedGradients  # what self-influence needs of one use of a block


@dataclass
class SelfTerms:
    """A row's own gradient in a block.

    Attributes:
        norms: ``<D g_i, g_i>`` and ``|D g_i|^2`` [b, 2].
        energies: Of its units [b, 1 + J], see :func:`.signed_by`.
    """

    norms: Tensor
    energies: Tensor


@dataclass
class Plan:
    """What one block's direction is made of: the K-FAC discount, its weight, the exponents of both discounts."""

    discount: SpectralOperator
    weight: Tensor | float
    exponents: tuple[Tensor | float, Tensor | float]


@dataclass
class Direction(ABC):
    """What a block's records are met with.

    Attributes:
        block: The block.
        contrasts: Signs of its units.
        queries: U [Q, *layout], or what is left of it in the basis; None without queries.
    """

    block: Block
    contrasts: Contrasts
    queries: Tensor | None

    @abstractmethod
    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        """Signals with their contrasts [b, Q, 1 + J], None without queries, and what :meth:`self_terms_of` needs."""

    @abstractmethod
    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        """The row's own gradient, summed over all uses of the block in a batch."""

    def draw(self, turn: int) -> None:  # noqa: B027 - most have nothing to draw
        """Draws new columns for the sketch, where there is one."""


@dataclass
class Exact(Direction):
    """U and D as they are, in float32 or better.

    Attributes:
        discount: D.
    """

    discount: SpectralOperator

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        grad_sample = grad_sample.wide()
        if self.queries is None:
            return None, grad_sample
        return self.contrasts.of_queries(self.block, grad_sample, self.queries), grad_sample

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        grad_samples = [use for use in uses if isinstance(use, GradSample)]
        norms = (
            self.discount.norms(grad_samples[0]) if len(grad_samples) == 1 else self.discount.norms_of_sum(grad_samples)
        )
        return SelfTerms(norms, self.contrasts.of_self(self.block, grad_samples))


@dataclass
class Flat(Direction):
    """Of a vector: one product for the signals, one of its squares for all else.

    Attributes:
        discount: D.
    """

    discount: SpectralOperator

    def __post_init__(self) -> None:
        signs = self.contrasts.signs(self.block, self.block.layout)
        weight = torch.ones_like(signs[0]) if self.discount.weight is None else self.discount.weight
        self._turned: Tensor | None = None
        if self.queries is not None:
            self._turned = (self.queries[:, None] * signs).flatten(0, 1).T
        self._squares = torch.cat([torch.stack([weight, weight.square()]), signs]).T

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        assert isinstance(grad_sample, Vector)
        if self._turned is None:
            return None, grad_sample
        return (grad_sample.g @ self._turned).view(grad_sample.rows, -1, 1 + self.contrasts.count), grad_sample

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        squares = summed([use.g for use in uses if isinstance(use, Vector)]).square() @ self._squares
        return SelfTerms(squares[:, :2], squares[:, 2:])


@dataclass
class Joint(Direction):
    """One pass over a record makes each row's gradient in a few columns of its inputs; all else is read off that.

    The columns are the queries' basis, then those of the sketch's input side if rows' own gradients are asked for.
    Queries without a basis are given in the sketch's own columns where these are all there are (:attr:`whole`), else
    they are met apart and exactly. Records may be in bfloat16. It can contract once columns are drawn.

    Attributes:
        own: The sketch of D; None where rows' own gradients are not asked for.
        basis: The dimensions [G, I, r] that the queries are given in, see :mod:`ine_callback.curvature.low_rank`.
        whole: Whether the queries are given in the sketch's columns.

    Where the block's units are the network's outputs all of this is of the transposed gradients, see
    :class:`Contrasts`.
    """

    own: Sketched | None
    basis: Tensor | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        groups, out, inputs = self.block.layout
        self._signs = self.contrasts.signs(self.block, (groups, inputs if self.block.outputs else out))
        rank = 0 if self.basis is None else self.basis.shape[-1]
        self._asked, self._rest = slice(0, rank or None), slice(rank, None)
        self._inside = self.queries is not None and (self.whole or rank > 0)
        self._turned: Tensor | None = None
        if self.queries is not None and self._inside and len(self.queries) <= MAX_WEIGHTED_QUERIES:
            self._turned = weighted_columns(self.queries, self._signs)
        if self.own is not None:
            self._weights = self.own.weights.transpose(-1, -2).flatten(1).T

    def draw(self, turn: int) -> None:
        if self.own is not None:
            # blocks may be met in another order in a resumed run, and have other names in a LightningModule
            seed = zlib.crc32(f"{self.block.position} {self.block.layout} {turn}".encode())
            self.own.draw(torch.Generator(self.block.parameters[0].device).manual_seed(seed))
        right = None if self.own is None else self.own.right
        columns = [x for x in (self.basis, right) if x is not None]
        self._columns = torch.cat(columns, -1) if columns else None

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        if self.block.outputs:
            assert isinstance(grad_sample, Outer | Lookup)
            grad_sample = grad_sample.transposed()
        assert isinstance(grad_sample, Outer)
        signals = None
        if self.queries is not None and not self._inside:
            signals = grad_sample.parts(self.queries, self._signs)
        if self._columns is None:
            return signals, grad_sample
        if grad_sample.output_grads.shape[2] == 1:
            return self._one_by_one(grad_sample, signals)
        small = grad_sample.compressed(self._columns)
        if self.queries is not None and self._inside:
            asked = small.part(self._asked)
            if self._turned is None:
                signals = asked.parts(self.queries, self._signs)
            else:
                signals = asked.contract(self._turned).view(grad_sample.rows, len(self.queries), -1)
        return signals, small.part(self._rest)

    def _one_by_one(self, grad_sample: Outer, signals: Tensor | None) -> tuple[Tensor | None, Use]:
        """Without positions a gradient is one product: its two sides are met one by one."""
        assert self._columns is not None
        projected, delta = widened(grad_sample.projected(self._columns)), widened(grad_sample.output_grads)
        if self.queries is not None and self._inside:
            signals = Outer(projected[..., self._asked], delta).parts(self.queries, self._signs)
        return signals, Outer(projected[..., self._rest], delta)

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        assert self.own is not None
        if len(uses) == 1 and isinstance(use := uses[0], Outer):
            return SelfTerms(use.rotated(self.own.left, None).norms(self.own.weights), use.energies(self._signs))
        small = CompressedGradients(summed([_formed(use) for use in uses]))
        return SelfTerms(small.norms_in(self.own.left, self._weights), small.energies(self._signs))


def _formed(use: Use) -> Tensor:
    """The transposed gradients [b, G, k, O] of one use."""
    return use.g if isinstance(use, CompressedGradients) else use.gradient(slice(None)).transpose(-1, -2)


def direction_of(
    block: Block,
    contrasts: Contrasts,
    u: Tensor | None,
    plan: Plan,
    rank: int | None,
    mixed: int | None,
) -> tuple[Direction, Tensor | None]:
    """A block's direction in the form in which records are met fastest, and the share kept where it is low-rank.

    Args:
        block: The block.
        contrasts: Signs of the blocks' units.
        u: Directions U [Q, *layout], None without queries.
        plan: What they are made of.
        rank: Most dimensions of a basis; None: exact.
        mixed: Mixtures of a sketch of D, see :func:`.lowrank.mixtures`; None: rows' own gradients are not asked for.
    """
    discount = plan.discount
    if len(block.layout) == 1:
        return Flat(block, contrasts, u, discount), None
    exact = Exact(block, contrasts, u, discount)
    # a shared block's gradient is formed where that is little; if it is not the last layer its units are of two kinds
    large = block.outputs and block.layout[1] * block.layout[2] > WHOLE
    if rank is None or discount.sides is None or not (large if block.tied else block.matrix):
        return exact, None
    own = None if mixed is None else discount.sketched(mixed)
    assert not isinstance(own, SpectralOperator)  # it has sides
    sides = discount.sides
    if block.outputs:
        sides = sides[::-1]
        u = None if u is None else u.transpose(-1, -2)
        own = None if own is None else own.transposed()
    if own is not None and not own.has_columns:
        return exact, None
    found = None if u is None else low_rank(u, *sides, rank)
    if found is not None:
        basis, u, share = found
        return Joint(block, contrasts, u, own, basis), share
    if u is not None and own is not None and own.right is not None and own.columns is None:
        return Joint(block, contrasts, u @ own.right, own, whole=True), None
    if u is not None and own is None and u.shape[3] < min(SMALLEST, u.shape[2]):
        # few inputs: gradients in all of them are smaller than the products of U with the inputs
        every = torch.eye(u.shape[3], device=u.device, dtype=u.dtype).expand(u.shape[1], -1, -1)
        return Joint(block, contrasts, u, own, every), None
    return Joint(block, contrasts, u, own), None
