"""What the backward passes of one optimizer step found, until the step is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.distributed.processes import Processes
from ine_callback.optimizers.clipping import Change
from ine_callback.scoring.compression import Compressed


@dataclass(frozen=True)
class Observations:
    """Rows of one step, with their signals and losses.

    Attributes:
        rows: Dataset indices [b].
        signals: Signals, each with its contrasts and halves [b, Q, 1 + J + H] (:attr:`.Directions.width`).
        self_variance: Squared units of self-influence [b].
        losses: The rows' losses [b], NaN where unknown.
        margins: The rows' margins [b] (:mod:`ine_callback.capture.row_margins`), NaN where unknown.
        compressed: Their contributions, compressed for a gradient store [b, W]; W = 0 without one.
    """

    rows: Tensor
    signals: Tensor
    self_variance: Tensor
    losses: Tensor
    margins: Tensor
    compressed: Tensor

    def again(self, later: Observations) -> Observations:
        """The same rows with a further backward pass."""
        return replace(self.more(later), losses=self.losses + later.losses)

    def more(self, other: Observations) -> Observations:
        """The same backward pass with further blocks."""
        summed = ("signals", "self_variance", "compressed")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in summed})

    def times(self, factor: Tensor | float) -> Observations:
        """With the contributions to the step times a factor."""
        return replace(self, signals=self.signals * factor, compressed=self.compressed * factor)

    def joined(self, processes: Processes, sizes: Sequence[int]) -> Observations:
        """Those of all processes, this one's being ``sizes[rank]``; right after an exchange."""
        if processes.count == 1:
            return self
        others = torch.stack([self.self_variance, self.losses, self.margins], 1).to(self.signals.dtype)
        rows = processes.join(self.rows, sizes)
        packed = processes.join(torch.cat([self.signals.flatten(1), others], 1), sizes)
        signals = packed[:, :-3].unflatten(1, self.signals.shape[1:])
        compressed = processes.join(self.compressed, sizes) if self.compressed.shape[1] else packed[:, :0]
        self_variance, losses, margins = packed[:, -3:].unbind(1)
        return Observations(rows, signals, self_variance, losses, margins, compressed)


def or_unknown(read: Tensor | None, like: Tensor) -> Tensor:
    """What was read of each row [b], in the type of ``like`` [b]; all NaN where nothing was."""
    return torch.full_like(like, torch.nan) if read is None else read.to(like.dtype)


@dataclass(frozen=True)
class Pass:
    """What one backward pass found, before it is known what becomes of the gradients.

    Attributes:
        rows: Dataset indices [b].
        blocks: The K blocks whose signals are told apart; none: one sum.
        signals: As of :class:`Observations`, of each block or their sum [K, b, Q, 1 + J + H].
        self_variance: As of :class:`Observations`, of each block [K, b] or their sum [1, b].
        losses: As of :class:`Observations`; parts of one pass share them.
        margins: As of :class:`Observations`.
        compressed: As of :class:`Observations`, with each block's places; None without a gradient store.
        number: How many passes the batch had before.
        changes: What was done to the gradients since.
    """

    rows: Tensor
    blocks: tuple[Block, ...]
    signals: Tensor
    self_variance: Tensor
    losses: Tensor
    margins: Tensor
    compressed: Compressed | None = None
    number: int = 0
    changes: list[Change] = field(default_factory=list)

    def only(self, which: Sequence[int]) -> Pass:
        """The part of some blocks."""
        if len(which) == len(self.blocks):
            return replace(self, changes=[])
        index = torch.tensor(which, device=self.signals.device)
        blocks = tuple(self.blocks[k] for k in which)
        parts = {name: getattr(self, name)[index] for name in ("signals", "self_variance")}
        compressed = None if self.compressed is None else self.compressed.only(blocks)
        return replace(self, blocks=blocks, **parts, compressed=compressed, changes=[])

    def observations(self) -> Observations:
        """With each block's signals times what was done to its gradients."""
        signals, compressed = self.signals, self.compressed
        for change in self.changes:
            factors = change.factors(self.blocks) if self.blocks else change.total()[None]
            signals = signals * factors.to(signals.dtype)[:, None, None, None]
            compressed = None if compressed is None else compressed.times(self.blocks, factors)
        values = self.losses.new_zeros(len(self.rows), 0) if compressed is None else compressed.values
        return Observations(self.rows, signals.sum(0), self.self_variance.sum(0), self.losses, self.margins, values)


class Pending:
    """The passes of a step that is not yet taken."""

    def __init__(self) -> None:
        self._passes: list[Pass] = []

    def __bool__(self) -> bool:
        return bool(self._passes)

    def add(self, one: Pass) -> None:
        """Takes what a backward pass found."""
        self._passes.append(one)

    def change(self, change: Change) -> None:
        """The gradients of all passes so far were changed."""
        for one in self._passes:
            one.changes.append(change)

    @property
    def changes(self) -> list[Change]:
        """In the order in which they happened: the first pass saw them all."""
        return self._passes[0].changes if self._passes else []

    def drop_counted(self) -> None:
        """Forgets passes without blocks: one optimizer's step has counted their rows for all."""
        self._passes = [one for one in self._passes if one.blocks]

    def take(self) -> list[Pass]:
        """All of them, and none is pending any more."""
        taken, self._passes = self._passes, []
        return taken


class Taken:
    """The passes that steps have taken since the last update of the accumulators, with the rates of these steps."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, list[Pass]]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, rate: float, passes: list[Pass]) -> None:
        """A step at this effective learning rate took these passes."""
        self._steps.append((rate, passes))

    def take(self, nothing: Tensor, width: int) -> list[tuple[Observations, float]]:
        """What the steps took, as observations at one rate, and nothing is left; one at least, maybe without rows.

        Steps that took passes of the same batches make one observation of their rows: two would depend on each other.

        Args:
            nothing: The signals of no rows [0, Q, 1 + J + H].
            width: Numbers that a row's compressed contributions have.
        """
        groups: dict[tuple[int, ...], list[tuple[float, list[Pass]]]] = {}
        for rate, passes in self._steps:
            if passes:
                groups.setdefault(tuple(dict.fromkeys(id(one.rows) for one in passes)), []).append((rate, passes))
        steps, self._steps = self._steps, []
        if groups:
            return [_together(group) for group in groups.values()]
        none = nothing.new_zeros(0)
        return [(Observations(none.long(), nothing, none, none, none, none.new_zeros(0, width)), steps[0][0])]


def _together(steps: Sequence[tuple[float, Sequence[Pass]]]) -> tuple[Observations, float]:
    """Steps that took the same batches, at the rate of the first one that moved anything."""
    common = next((rate for rate, _ in steps if rate), 0.0)
    passes: dict[int, Observations] = {}
    for rate, taken in steps:
        for one in taken:
            found = one.observations()
            if rate != common:
                found = found.times(rate / common)
            before = passes.get(id(one.losses))
            passes[id(one.losses)] = found if before is None else before.more(found)
    batches: dict[int, list[Observations]] = {}
    for found in passes.values():
        batches.setdefault(id(found.rows), []).append(found)
    parts = [reduce(Observations.again, batch) for batch in batches.values()]
    names = ("rows", "signals", "self_variance", "losses", "margins", "compressed")
    return Observations(*(torch.cat([getattr(part, name) for part in parts]) for name in names)), common
