"""What the batches of one optimizer step left, kept until the step is really taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.distributed.processes import Processes


@dataclass(frozen=True)
class Visits:
    """Rows and what their visit left.

    Attributes:
        rows: Dataset indices [b].
        signals: Signals and contrasts [b, Q, 1 + J].
        own: Squared units of the rows' own losses [b].
        losses: The rows' losses [b], NaN where unknown.
    """

    rows: Tensor
    signals: Tensor
    own: Tensor
    losses: Tensor

    def again(self, later: Visits) -> Visits:
        """The same rows with a further backward pass."""
        return Visits(self.rows, self.signals + later.signals, self.own + later.own, self.losses + later.losses)

    def times(self, factor: Tensor | float) -> Visits:
        """With the shares of the step times a factor."""
        return Visits(self.rows, self.signals * factor, self.own, self.losses)

    def joined(self, processes: Processes, sizes: Sequence[int]) -> Visits:
        """Those of all processes, this one's being ``sizes[rank]``; right after a meeting."""
        if processes.count == 1:
            return self
        own, losses = (x.to(self.signals.dtype)[:, None] for x in (self.own, self.losses))
        rows = processes.join(self.rows, sizes)
        packed = processes.join(torch.cat([self.signals.flatten(1), own, losses], 1), sizes)
        return Visits(rows, packed[:, :-2].unflatten(1, self.signals.shape[1:]), packed[:, -2], packed[:, -1])


class Pending:
    """The visits of a step that is not yet taken."""

    def __init__(self) -> None:
        self._parts: list[Visits] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, visits: Visits) -> None:
        """Takes what a backward pass left; a further pass of the same batch adds to the one before."""
        if self._parts and self._parts[-1].rows is visits.rows:
            visits = self._parts.pop().again(visits)
        self._parts.append(visits)

    def clear(self) -> None:
        """Forgets them: their step was skipped."""
        self._parts.clear()

    def take(self, columns: int, contrasts: int, device: torch.device) -> Visits:
        """All of them, as one; they are no longer pending. None at all have signals [0, columns, 1 + contrasts]."""
        parts, self._parts = self._parts, []
        if not parts:
            none = torch.zeros(0, device=device)
            return Visits(none.long(), none.new_zeros(0, columns, 1 + contrasts), none, none)
        names = ("rows", "signals", "own", "losses")
        return Visits(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
