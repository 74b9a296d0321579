"""What a run was made with, and what became of it: the facts beside a report's scores."""

from __future__ import annotations

import datetime
import platform
import time
import warnings
from typing import Any

import lightning
import numpy as np
import torch

from ine_callback._version import __version__
from ine_callback.methods import FINE
from ine_callback.recording.guard import Guard
from ine_callback.recording.setup import Parts, records_signals
from ine_callback.report import RunInfo
from ine_callback.utilities import fused

SINGLE_ROW = (
    "a step has a single row, and a row's influence is its difference to its batch-mates: such steps give no score; "
    "train with batches of at least 2 rows, or accumulate several batches into a step (accumulate_grad_batches)"
)


class Clock:
    """When a recording began, and how long it lasts.

    Attributes:
        started: When it began, before the first resumption.
    """

    def __init__(self) -> None:
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self._begin, self._seconds = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """How long the recording has lasted, or lasted."""
        return self._seconds or time.monotonic() - self._begin

    def stop(self) -> None:
        """The recording is over."""
        self._seconds = time.monotonic() - self._begin

    def resume(self, started: datetime.datetime, seconds: float) -> None:
        """Goes on from a recording that had lasted so long."""
        self.started = started
        self._begin -= seconds


def versions() -> dict[str, str]:
    """Versions of this package and of what it computes with; no paths, no hostnames."""
    return {
        "ine_callback": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def incomplete(guard: Guard, signals: bool) -> str:
    """Why the scores cover less than the training, in one line; empty where they cover it.

    Args:
        guard: The recording's steps.
        signals: Whether it recorded signals, which a step with a single row has none of.
    """
    steps, taken, why = guard.steps, guard.taken, guard.reason or "; ".join(guard.notes[:1])
    if guard.failed and steps:
        return f"The scores cover steps 0-{steps - 1} of {taken} only. Recording stopped: {why}"
    if guard.failed:
        return f"Nothing was recorded: {why}"
    if not steps:
        missed = "no optimizer step was taken" if not taken else f"none of {taken} optimizer steps had a recorded batch"
        remedy = "give the optimizer whose step() is called, and let every backward pass lie in a recorded batch"
        return f"Nothing was recorded: {missed}; {remedy}."
    if signals and guard.widest == 1:
        return f"No row has a score: {SINGLE_ROW}."
    return ""


def warn_if_incomplete(guard: Guard, signals: bool) -> None:
    """Tells the user when the recording stops; see :func:`incomplete`."""
    if (guard.failed or guard.taken) and (missing := incomplete(guard, signals)):
        warnings.warn(f"{guard.owner}: {missing}", stacklevel=3)


def run_info(guard: Guard, clock: Clock, parts: Parts, config: dict[str, Any]) -> RunInfo:
    """The facts of a recording.

    Args:
        guard: Its steps and notes.
        clock: When it began, and how long it lasted.
        parts: What it worked with.
        config: Its options.
    """
    method, schedule, coverage = parts.methods[0], parts.schedule.summary(), parts.coverage
    counts = method.nonfinite.tolist() if isinstance(method, FINE) else []
    lost = {info.name: int(count) for info, count in zip(parts.accumulators.queries, counts, strict=False) if count}
    return RunInfo(
        config=config,
        versions=versions(),
        seed=torch.initial_seed(),
        started=clock.started.isoformat(timespec="seconds"),
        seconds=clock.seconds,
        steps=guard.steps,
        rows=parts.accumulators.check.count,
        captured_share=coverage.share,
        approximate=coverage.approximate,
        uncaptured=coverage.uncaptured,
        nonfinite=lost,
        incomplete=incomplete(guard, records_signals(parts.methods)),
        schedule=schedule,
        notes=[
            *guard.notes,
            *method.notes(),
            *(note for lane in parts.lanes for note in lane.clipping.notes()),
            *coverage.notes,
            *parts.training.source.notes,
            *([schedule["note"]] if schedule["note"] and not guard.failed else []),
            *parts.signals.notes(),
            *fused.failures(),
        ],
    )
