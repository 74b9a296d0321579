"""What the store adds to a training step: recordings with it and without it take steps in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead import workloads
from benchmarks.overhead.__main__ import timed
from benchmarks.overhead.steppers import Plain, Recorded
from ine_callback import GradientStore

WORKLOADS = ("mlp", "cnn", "transformer")
WITHOUT, WITH = "one query", "one query and the store"
KINDS = ("ordinary", "look", "refresh")


FEW = 2040  # numbers of a row during the run, as few as the default ever has: what a user can choose instead


def of_step(name: str, where: Path | None, rounds: int, working: int | None = None) -> dict[str, Any]:
    """Steps by the plain step, and the difference that the store makes, by kind of step."""
    workload, device = workloads.load(name, where), torch.device("cpu")
    query = {"val": workload.query}
    makers = {
        "plain": lambda: Plain(workload, device),
        WITHOUT: lambda: Recorded(workload, device, query),
        WITH: lambda: Recorded(workload, device, query, store=GradientStore(working=working)),
    }
    found = timed(workload, device, rounds, makers, [])
    both = found["steppers"][WITHOUT], found["steppers"][WITH]
    added = {kind: both[1][kind]["ratio"] - both[0][kind]["ratio"] for kind in KINDS if all(kind in b for b in both)}
    if all("runs" in each for each in both):
        added |= {f"{n} steps": both[1]["runs"][n] - both[0]["runs"][n] for n in both[0]["runs"]}
    numbers = GradientStore(working=working).entries(len(workload.x))
    what = f"{found['what']}, {len(workload.x):,} rows, {numbers:,} numbers"
    return {"what": what, "plain_ms": found["plain_ms"], "steppers": found["steppers"], "added": added}
