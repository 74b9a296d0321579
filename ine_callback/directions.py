"""What a refresh leaves for one block: how a record is contracted with every query's U and with its own discount D.

Self-influence is discounted by K-FAC alone: the reservoir's discount would need each row's own projections.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ine_callback.capture import Block, Outer, Record
from ine_callback.contrasts import Contrasts
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

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        """Signals with their contrasts [b, Q, 1 + J] and, if asked for, the row's own gradient."""
        return self._contract_apart(record, with_own)

    def _contract_apart(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
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
class Joint(Direction):
    """One pass over a record makes each row's gradient in a few columns of its inputs; all else is read off that.

    The columns are the queries' basis followed by those of the sketch's input side; without a basis the queries are
    given in the sketch's own columns, which are all there are.
    """

    def contract(self, record: Record, with_own: bool) -> tuple[Tensor | None, Own | None]:
        assert isinstance(record, Outer) and isinstance(self.own, Sketched) and self.own.right is not None
        if record.delta.shape[2] == 1:  # a gradient is one product: its two sides are met one by one
            basis = self.own.right if self.basis is None else self.basis
            return replace(self, basis=basis)._contract_apart(record, with_own)
        columns, rank = self.own.right, 0
        if self.basis is not None:
            columns, rank = torch.cat([self.basis, columns], -1), self.basis.shape[-1]
        small = record.compressed(columns)
        signs = self.contrasts.signs(self.block, record).to(small.g.dtype)
        signals = None
        if self.queries is not None:
            signals = small.part(slice(0, rank or None)).parts(self.queries, signs)
        if not with_own:
            return signals, None
        own = small.part(slice(rank, None))
        energies = own.energies(signs)
        turned = energies / energies[:, :1].clamp_min(torch.finfo(energies.dtype).tiny)
        return signals, Own(own.norms_in(self.own.left, self.own.weights), turned)


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
    small = isinstance(own, Sketched) and own.columns is None and own.right is not None
    if block.outputs or not isinstance(own, Sketched) or (u is not None and basis is None and not small):
        return Direction(block, contrasts, u, discount, own, plan.weight, basis), share
    if u is not None and basis is None:
        assert own.right is not None
        u = u @ own.right
    return Joint(block, contrasts, u, discount, own, plan.weight, basis), share
