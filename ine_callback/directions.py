"""What a refresh leaves for one block: how a record is contracted with every query's U and with its own discount D.

Self-influence is discounted by K-FAC alone: the reservoir's discount would need each row's own projections.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.capture import Block, Outer, Record, Vector
from ine_callback.capture.compressed import FEW_QUERIES, turned
from ine_callback.contrasts import Contrasts
from ine_callback.curvature import Discount, Sketched
from ine_callback.lowrank import low_rank


@dataclass
class Own:
    """A row's own gradient in a block.

    Attributes:
        norms: ``<D g_i, g_i>`` and ``|D g_i|^2`` [b, 2].
        energies: Of its units [b, 1 + J], see :func:`.turned_by`.
    """

    norms: Tensor
    energies: Tensor


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
        basis: The dimensions [G, I, r] that the queries are given in, see :mod:`ine_callback.lowrank`; None: all.
    """

    block: Block
    contrasts: Contrasts
    queries: Tensor | None
    discount: Discount
    own: Discount | Sketched
    basis: Tensor | None = None

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        """Signals with their contrasts [b, Q, 1 + J] and, if asked for, the row's own gradient."""
        signals = None
        if self.queries is not None:
            signals = self.contrasts.of_queries(self.block, record, self.queries, self.basis)
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
class Flat(Direction):
    """Of a vector: one product for the signals, one of its squares for all else."""

    def __post_init__(self) -> None:
        signs = self.contrasts.signs(self.block, self.block.layout)
        weight = torch.ones_like(signs[0]) if self.discount.weight is None else self.discount.weight
        self._turned: Tensor | None = None
        if self.queries is not None:
            self._turned = (self.queries[:, None] * signs).flatten(0, 1).T
        self._squares = torch.cat([torch.stack([weight, weight.square()]), signs]).T

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        assert isinstance(record, Vector)
        signals = None
        if self._turned is not None:
            signals = (record.g @ self._turned).view(record.rows, -1, 1 + self.contrasts.count)
        if not with_own:
            return signals, None
        squares = record.g.square() @ self._squares
        return signals, Own(squares[:, :2], squares[:, 2:])


@dataclass
class Joint(Direction):
    """One pass over a record makes each row's gradient in a few columns of its inputs; all else is read off that.

    The columns are the queries' basis, then those of the sketch's input side if rows' own gradients are asked for;
    without a basis the queries are given in the sketch's own columns, which are all there are. It can contract once
    columns are drawn, records in bfloat16 too.
    """

    def __post_init__(self) -> None:
        self._signs = self.contrasts.signs(self.block, self.block.layout[:2])
        rank = 0 if self.basis is None else self.basis.shape[-1]
        self._asked, self._rest = slice(0, rank or None), slice(rank, None)
        self._turned: Tensor | None = None
        if self.queries is not None and len(self.queries) <= FEW_QUERIES:
            self._turned = turned(self.queries, self._signs)
        if isinstance(self.own, Sketched):
            self._weights = self.own.weights.transpose(-1, -2).flatten(1).T

    def draw(self, turn: int) -> None:
        super().draw(turn)
        right = self.own.right if isinstance(self.own, Sketched) else None
        self._columns = torch.cat([x for x in (self.basis, right) if x is not None], -1)

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        assert isinstance(record, Outer)
        if record.delta.shape[2] == 1:
            return self._one_by_one(record.wide(), with_own)
        small, signals = record.compressed(self._columns), None
        if self.queries is not None:
            asked = small.part(self._asked)
            if self._turned is None:
                signals = asked.parts(self.queries, self._signs)
            else:
                signals = asked.met(self._turned).view(record.rows, len(self.queries), -1)
        if not with_own:
            return signals, None
        assert isinstance(self.own, Sketched)
        rest = small.part(self._rest)
        return signals, Own(rest.norms_in(self.own.left, self._weights), rest.energies(self._signs))

    def _one_by_one(self, record: Outer, with_own: bool) -> tuple[Tensor | None, Own | None]:
        """Without positions a gradient is one product: its two sides are met one by one."""
        projected, signals = record.projected(self._columns), None
        if self.queries is not None:
            signals = Outer(projected[..., self._asked], record.delta).parts(self.queries, self._signs)
        if not with_own:
            return signals, None
        assert isinstance(self.own, Sketched)
        rest = Outer(projected[..., self._rest], record.delta)
        return signals, Own(rest.rotated(self.own.left, None).norms(self.own.weights), rest.energies(self._signs))


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
    if len(block.layout) == 1:
        return Flat(block, contrasts, u, discount, discount), None
    if rank is None or sides is None or not block.matrix:
        return Direction(block, contrasts, u, discount, discount), None
    own = discount.sketched() if with_own else discount
    basis, share = None, None
    if u is not None:
        left, right = sides
        sided = (u.transpose(-1, -2), right, left) if block.outputs else (u, left, right)  # see Contrasts
        found = low_rank(*sided, rank)
        if found is not None:
            basis, u, share = found
    columns = isinstance(own, Sketched) and own.has_columns
    if block.outputs or not (columns if with_own else basis is not None):
        return Direction(block, contrasts, u, discount, own, basis), share
    if u is not None and basis is None:
        assert isinstance(own, Sketched)
        if own.right is None or own.columns is not None:  # the sketch's columns are not all there are
            return Direction(block, contrasts, u, discount, own), None
        u = u @ own.right
    return Joint(block, contrasts, u, discount, own, basis), share
