"""What can be read of a recording."""

from __future__ import annotations

from typing import Any

from torch import nn

from ine_callback.optimizers.schedule import Schedule
from ine_callback.queries import BoundQuery
from ine_callback.recording.accumulators import RowAccumulators
from ine_callback.recording.guard import Guard
from ine_callback.recording.setup import Parts, Training
from ine_callback.recording.store.recording import StoreRecording
from ine_callback.scores import QueryInfo
from ine_callback.scoring.signals import Signals


class Readable:
    """What users and the integrations read of a :class:`~ine_callback.Recorder`."""

    guard: Guard
    training: Training
    _parts: Parts
    _handles: list[Any]

    @property
    def running(self) -> bool:
        """Whether hooks are attached: from :meth:`start` to :meth:`stop`, also after an exception."""
        return bool(self._handles)

    @property
    def recording(self) -> bool:
        """Whether steps are recorded."""
        return self.guard.recording

    @property
    def steps(self) -> int:
        """Optimizer steps recorded."""
        return self.guard.steps

    @property
    def failed(self) -> bool:
        """Whether an exception stopped the recording."""
        return self.guard.failed

    @property
    def notes(self) -> list[str]:
        """Sentences for the report."""
        return self.guard.notes

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.training.module

    @property
    def infos(self) -> tuple[QueryInfo, ...]:
        """The scored queries, in column order."""
        return self.accumulators.queries

    @property
    def bound(self) -> list[BoundQuery]:
        """The queries on data, with their batches."""
        return self._parts.bound

    @property
    def schedule(self) -> Schedule:
        """The learning rate that remains."""
        return self._parts.schedule

    @property
    def signals(self) -> Signals:
        """Directions, and the per-sample gradients' inner products with them."""
        return self._parts.signals

    @property
    def store(self) -> StoreRecording | None:
        """What later queries are asked of; None without one."""
        return self._parts.store

    @property
    def accumulators(self) -> RowAccumulators:
        """Everything stored for every row."""
        return self._parts.accumulators
