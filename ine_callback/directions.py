"""What a refresh leaves for one block: how a record is contracted with every query's U and with its own discount D.

Self-influence is discounted by K-FAC alone: the reservoir's discount would need each row's own projections.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.capture import Block, Outer, Record
from ine_callback.contrasts import Contrasts, turned_by
from ine_callback.curvature import Discount, Sketched
from ine_callback.lowrank import low_rank


@dataclass
class Own:
    """A row's own gradient in a block.

    Attributes:
        norms: ``<D g_i, g_i>`` and ``|D g_i|^2`` [b, 2].
        turned: Factors [b, 1 + J] that turn the block's self-influence into itself and its contrasts.
    """

    norms: Tensor
    turned: Tensor


@dataclass
class Plan:
    """What one block's direction is made of: the K-FAC discount, its weight, the exponents of both discounts."""

    discount: Discount
    weight: Tensor | float
    exponents: tuple[Tensor | float, Tensor | float]


@dataclass
class Direction:
    """Exact, or with low-rank directions of the queries and a sketch of the discount, one after the other.

    Attributes:
        block: The block.
        contrasts: Signs of its units.
        queries: U [Q, *layout], or what is left of it in the basis; None without queries.
        discount: D.
        own: D in the form in which a row's own gradient meets it.
        weight: The block's rate relative to the step's.
        basis: See :mod:`ine_callback.lowrank`.
    """

    block: Block
    contrasts: Contrasts
    queries: Tensor | None
    discount: Discount
    own: Discount | Sketched
    weight: Tensor | float
    basis: Tensor | None = None

    @property
    def inputs(self) -> Tensor | None:
        """The dimensions [G, I, r] that the queries are given in; None: all."""
        return self.basis

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        """Signals with their contrasts [b, Q, 1 + J] and, if asked for, the row's own gradient."""
        signals = None
        if self.queries is not None:
            signals = self.contrasts.of_queries(self.block, record, self.queries, self.inputs)
        if not with_own:
            return signals, None
        return signals, Own(self.own.norms(record), self.contrasts.of_self(self.block, [record]))

    def draw(self, turn: int) -> None:
        """Draws new columns for the sketch."""
        if isinstance(self.own, Sketched):
            # blocks may be met in another order in a resumed run, and have other names in a LightningModule
            seed = zlib.crc32(f"{self.block.position} {self.block.layout} {turn}".encode())
            self.own.draw(torch.Generator(self.block.parameters[0].device).manual_seed(seed))


@dataclass
class Joint(Direction):
    """One pass over a record makes each row's gradient in a few columns of its inputs; all else is read off that.

    The columns are the queries' basis followed by those of the sketch's input side; without a basis the queries are
    given in the sketch's own columns, which are all there are. It can contract once columns are drawn.
    """

    own: Sketched

    @property
    def inputs(self) -> Tensor | None:
        return self.own.right if self.basis is None else self.basis

    def draw(self, turn: int) -> None:
        super().draw(turn)
        self._columns = torch.cat([x for x in (self.basis, self.own.right) if x is not None], -1)

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        assert isinstance(record, Outer)
        if record.delta.shape[2] == 1:  # a gradient is one product: its two sides are met one by one
            return super().contract(record, with_own)
        rank = 0 if self.basis is None else self.basis.shape[-1]
        small = record.compressed(self._columns)
        signs = self.contrasts.signs(self.block, record).to(small.g.dtype)
        signals = None
        if self.queries is not None:
            signals = small.part(slice(0, rank or None)).parts(self.queries, signs)
        if not with_own:
            return signals, None
        own = small.part(slice(rank, None))
        return signals, Own(own.norms_in(self.own.left, self.own.weights), turned_by(own.energies(signs)))


def direction_of(
    block: Block, contrasts: Contrasts, u: Tensor | None, plan: Plan, rank: int | None, with_own: bool
) -> tuple[Direction, Tensor | None]:
    """A block's direction in the form in which records are met fastest, and the share kept where it is low-rank.

    Args:
        block: The block.
        contrasts: Signs of the blocks' units.
        u: Directions U [Q, *layout], None without queries.
        plan: What they are made of.
        rank: Most dimensions of a basis; None: exact.
        with_own: Whether rows' own gradients are asked for.
    """
    discount, sides = plan.discount, plan.discount.sides
    if rank is None or sides is None or not block.matrix:
        return Direction(block, contrasts, u, discount, discount, plan.weight), None
    own = discount.sketched() if with_own else discount
    basis, share = None, None
    if u is not None:
        left, right = sides
        turned = (u.transpose(-1, -2), right, left) if block.outputs else (u, left, right)  # see Contrasts
        found = low_rank(*turned, rank)
        if found is not None:
            basis, u, share = found
    if block.outputs or not isinstance(own, Sketched) or not own.has_columns:
        return Direction(block, contrasts, u, discount, own, plan.weight, basis), share
    if u is not None and basis is None:
        if own.right is None or own.columns is not None:  # the sketch's columns are not all there are
            return Direction(block, contrasts, u, discount, own, plan.weight), None
        u = u @ own.right
    return Joint(block, contrasts, u, discount, own, plan.weight, basis), share
