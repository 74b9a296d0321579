"""Batches of a fit whose methods need no signals: rows and their losses are noted, no hook reads the passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.row_losses import read_loss
from ine_callback.capture.row_margins import read_margins
from ine_callback.data.row_entries import row_entries
from ine_callback.errors import UnknownRows
from ine_callback.recording.backward import Rows
from ine_callback.recording.guard import Guard
from ine_callback.recording.observations import Pass, or_unknown
from ine_callback.recording.setup import Parts
from ine_callback.recording.steps import OptimizerSteps


class CountedBatches:
    """Stands in for :class:`~ine_callback.recording.backward.BackwardPasses`.

    Args:
        guard: Takes notes.
        parts: What the recording works with.
        steps: Takes the rows of each backward pass.
    """

    def __init__(self, guard: Guard, parts: Parts, steps: OptimizerSteps) -> None:
        self._guard, self._parts, self._steps = guard, parts, steps
        self._rows: Tensor | None = None
        self._losses: Tensor | None = None
        self._margins: Tensor | None = None

    def start_batch(self, rows: Rows, data: Any) -> None:
        """Announces the rows of the coming forward pass."""
        try:
            found = rows(data) if callable(rows) else rows
            given = row_entries(found)
            found = self._parts.accumulators.check.rows(found if given is None else given.rows, None if given else data)
        except UnknownRows as error:
            return self._steps.leave_out(error)
        self._rows = found.to(self._parts.device, torch.int64, non_blocking=True)
        self._losses = self._margins = None

    def see(self, loss: Tensor) -> None:
        """Reads each row's loss and margin off the loss about to be differentiated."""
        if self._rows is None:
            return
        with torch.no_grad():
            reading = read_loss(loss, len(self._rows))
            self._margins = read_margins(loss, len(self._rows))
        if reading is None:
            self._guard.note("the training loss is of no standard form: row losses unknown")
        else:
            self._losses = reading.rows

    def settle(self, backward: bool) -> None:
        """Moves the rows of a backward pass, if there was one, to those that wait for the optimizer's step."""
        if self._rows is None or not backward:
            return
        count, device = len(self._rows), self._parts.device
        signals = torch.zeros(1, count, 0, 1 + self._parts.signals.contrasts.count, device=device)
        self_variance = torch.zeros(1, count, device=device)
        losses, margins = (or_unknown(read, self_variance[0]) for read in (self._losses, self._margins))
        self._steps.add(Pass(self._rows, (), signals, self_variance, losses, margins))

    def end_batch(self) -> None:
        """Ends the batch; its rows wait for the optimizer's step."""
        self._rows = None

    def close(self) -> None:
        """Nothing is open."""
