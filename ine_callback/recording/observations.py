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


@dataclass(frozen=True)
class Observations:
    """Rows of one step, with their signals and losses.

    Attributes:
        rows: Dataset indices [b].
        signals: Signals and contrasts [b, Q, 1 + J].
        self_variance: Squared units of self-influence [b].
        losses: The rows' losses [b], NaN where unknown.
        margins: The rows' margins [b] (:mod:`ine_callback.capture.row_margins`), NaN where unknown.
    """

    rows: Tensor
    signals: Tensor
    self_variance: Tensor
    losses: Tensor
    margins: Tensor

    def again(self, later: Observations) -> Observations:
        """The same rows with a further backward pass."""
        signals, self_variance = self.signals + later.signals, self.self_variance + later.self_variance
        return Observations(self.rows, signals, self_variance, self.losses + later.losses, self.margins)

    def times(self, factor: Tensor | float) -> Observations:
        """With the contributions to the step times a factor."""
        return replace(self, signals=self.signals * factor)

    def joined(self, processes: Processes, sizes: Sequence[int]) -> Observations:
        """Those of all processes, this one's being ``sizes[rank]``; right after an exchange."""
        if processes.count == 1:
            return self
        others = torch.stack([self.self_variance, self.losses, self.margins], 1).to(self.signals.dtype)
        rows = processes.join(self.rows, sizes)
        packed = processes.join(torch.cat([self.signals.flatten(1), others], 1), sizes)
        return Observations(rows, packed[:, :-3].unflatten(1, self.signals.shape[1:]), *packed[:, -3:].unbind(1))


def or_unknown(read: Tensor | None, like: Tensor) -> Tensor:
    """What was read of each row [b], in the type of ``like`` [b]; all NaN where nothing was."""
    return torch.full_like(like, torch.nan) if read is None else read.to(like.dtype)


@dataclass(frozen=True)
class Pass:
    """What one backward pass found, before it is known what becomes of the gradients.

    Attributes:
        rows: Dataset indices [b].
        blocks: The K blocks whose signals are told apart; none: one sum.
        signals: Signals and contrasts [K, b, Q, 1 + J].
        self_variance: As of :class:`Observations`.
        losses: As of :class:`Observations`.
        margins: As of :class:`Observations`.
        changes: What was done to the gradients since.
    """

    rows: Tensor
    blocks: tuple[Block, ...]
    signals: Tensor
    self_variance: Tensor
    losses: Tensor
    margins: Tensor
    changes: list[Change] = field(default_factory=list)

    def observations(self) -> Observations:
        """With each block's signals times what was done to its gradients."""
        signals = self.signals
        for change in self.changes:
            factors = change.factors(self.blocks) if self.blocks else change.total()[None]
            signals = signals * factors.to(signals.dtype)[:, None, None, None]
        return Observations(self.rows, signals.sum(0), self.self_variance, self.losses, self.margins)


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

    def clear(self) -> None:
        """Forgets them: their step was skipped, or their gradients were removed."""
        self._passes.clear()

    def _batches(self) -> list[list[Pass]]:
        """The passes, those of one batch together."""
        batches: list[list[Pass]] = []
        for one in self._passes:
            if batches and batches[-1][0].rows is one.rows:
                batches[-1].append(one)
            else:
                batches.append([one])
        return batches

    def take(self, columns: int, contrasts: int, device: torch.device) -> Observations:
        """All of them as one, and none is pending any more; without any, signals are [0, columns, 1 + contrasts]."""
        parts = [reduce(Observations.again, (one.observations() for one in batch)) for batch in self._batches()]
        self._passes = []
        if not parts:
            none = torch.zeros(0, device=device)
            return Observations(none.long(), none.new_zeros(0, columns, 1 + contrasts), none, none, none)
        names = ("rows", "signals", "self_variance", "losses", "margins")
        return Observations(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
