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


def versions() -> dict[str, str]:
    """Versions of this package and of what it computes with; no paths, no hostnames."""
    return {
        "ine_callback": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


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
        rows=recorder.ledger.check.count,
        captured_share=coverage.share,
        approximate=coverage.approximate,
        uncaptured=coverage.uncaptured,
        nonfinite=lost,
        schedule=schedule,
        notes=[
            *recorder.notes,
            *(f"query '{name}': {n} signals were not finite and were left out" for name, n in lost.items()),
            *method.notes(),
            *coverage.notes,
            *recorder.source.notes,
            *([schedule["note"]] if schedule["note"] and not recorder.failed else []),
            *recorder.signals.notes(),
        ],
    )
