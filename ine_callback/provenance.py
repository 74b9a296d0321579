"""Where a report comes from: the facts of a recorded run."""

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
    from ine_callback.recorder import Recorder


def run_info(recorder: Recorder, rows: int) -> RunInfo:
    """The provenance of a recorder's report; no paths, no hostnames."""
    method = recorder.methods[0]
    counts = method.nonfinite.tolist() if isinstance(method, FINE) else []
    lost = {info.name: int(count) for info, count in zip(recorder.infos, counts, strict=False) if count}
    for name, count in lost.items():
        recorder.note(f"query '{name}': {count} signals were not finite and were left out")
    return RunInfo(
        config=recorder.config,
        versions={
            "ine_callback": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        seed=torch.initial_seed(),
        started=recorder.started.isoformat(timespec="seconds"),
        seconds=recorder.seconds,
        steps=recorder.steps,
        rows=rows,
        captured_share=recorder.coverage.share,
        approximate=recorder.coverage.approximate,
        uncaptured=recorder.coverage.uncaptured,
        nonfinite=lost,
        schedule=recorder.schedule.summary(),
        notes=recorder.all_notes(),
    )
