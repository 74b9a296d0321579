"""What checkpoints saved before all attributions had one form (until 0.1) hold of a fit's chains."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ine_callback.methods.packing import packed
from ine_callback.report import legacy


def former(stages: dict[str, Any] | None) -> dict[str, Any]:
    """The state of :class:`~ine_callback.methods.fit_end.FitEndMethods` that such a checkpoint stands for.

    Args:
        stages: Stages reached, and the files of a report as bytes; None where no chains were asked for.
    """
    if stages is None:
        return {"reached": [], "found": [], "notes": []}
    with TemporaryDirectory() as folder:
        for name in set(stages["files"]) & set(legacy.FILES):
            (Path(folder) / name).write_bytes(stages["files"][name].numpy().tobytes())
        found = legacy.load(Path(folder))
    return {"reached": stages["reached"], "found": [packed(each) for each in found], "notes": []}
