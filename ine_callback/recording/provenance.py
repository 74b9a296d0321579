"""What a run was made with, and what became of it: the facts beside a report's scores."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import lightning
import numpy as np
import torch

from ine_callback._version import __version__
from ine_callback.methods import FINE
from ine_callback.report import RunInfo

if TYPE_CHECKING:
    from ine_callback.recording.recorder import Recorder


SINGLE = (
    "a step has a single row, and a row's influence is its difference to its batch-mates: such steps give no score; "
    "train with batches of at least 2 rows, or accumulate several batches into a step (accumulate_grad_batches)"
)


def versions() -> dict[str, str]:
    """Versions of this package and of what it computes with; no paths, no hostnames."""
    return {
        "ine_callback": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def incomplete(recorder: Recorder) -> str:
    """Why the scores cover less than the training, in one line; empty where they cover it."""
    steps, taken, why = recorder.steps, recorder.taken, recorder.reason or "; ".join(recorder.notes[:1])
    if recorder.failed and steps:
        return f"The scores cover steps 0-{steps - 1} of {taken} only. Recording stopped: {why}"
    if recorder.failed:
        return f"Nothing was recorded: {why}"
    if not steps:
        missed = "no optimizer step was taken" if not taken else f"none of {taken} optimizer steps had a recorded batch"
        remedy = "give the optimizer whose step() is called, and let every backward pass lie in a recorded batch"
        return f"Nothing was recorded: {missed}; {remedy}."
    if recorder.widest == 1:
        return f"No row has a score: {SINGLE}."
    return ""


def run_info(recorder: Recorder) -> RunInfo:
    """The facts of a recording."""
    method, schedule, coverage = recorder.methods[0], recorder.schedule.summary(), recorder.coverage
    counts = method.nonfinite.tolist() if isinstance(method, FINE) else []
    lost = {info.name: int(count) for info, count in zip(recorder.infos, counts, strict=False) if count}
    return RunInfo(
        config=recorder.config,
        versions=versions(),
        seed=torch.initial_seed(),
        started=recorder.started.isoformat(timespec="seconds"),
        seconds=recorder.seconds,
        steps=recorder.steps,
        rows=recorder.accumulators.check.count,
        captured_share=coverage.share,
        approximate=coverage.approximate,
        uncaptured=coverage.uncaptured,
        nonfinite=lost,
        incomplete=incomplete(recorder),
        schedule=schedule,
        notes=[
            *recorder.notes,
            *(f"query '{name}': {n} signals were not finite and were left out" for name, n in lost.items()),
            *method.notes(),
            *recorder.clipping.notes(),
            *coverage.notes,
            *recorder.source.notes,
            *([schedule["note"]] if schedule["note"] and not recorder.failed else []),
            *recorder.signals.notes(),
        ],
    )
