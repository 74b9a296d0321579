"""Peak memory of a stepper: on a GPU beside the others, on the CPU in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lds.measure import measure
from benchmarks.overhead import workloads
from benchmarks.overhead.steppers import steppers

WATCHED, STEPS_ALONE = ("plain", "one query", "one query and self", "the same, exact"), 24


class Memory:
    """Peak bytes of each stepper on a GPU that holds all of them: what it keeps, and what its step needs above that."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.held: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Surrounds what a stepper does."""
        if not self.cuda:
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        before, held = torch.cuda.memory_allocated(), self.held.get(name, 0.0)
        yield
        self.peak[name] = max(self.peak.get(name, 0.0), held + torch.cuda.max_memory_allocated() - before)
        self.held[name] = held + torch.cuda.memory_allocated() - before


def alone(name: str, where: Path | None, stepper: str) -> None:
    """Some steps of one stepper on the CPU, two refreshes among them, in a process whose memory is watched."""
    workload = workloads.load(name, where)
    taken = steppers(workload, torch.device("cpu"), peers=False)[stepper]()
    g = torch.Generator().manual_seed(2)
    for _ in range(STEPS_ALONE):
        rows = torch.randperm(len(workload.x), generator=g)[: workload.batch]
        taken.step(rows, (workload.x[rows], workload.y[rows]))
    taken.close()


def on_the_host(name: str, where: Path | None, found: dict[str, Any]) -> float:
    """Fills in each stepper's peak of memory by the plain one's, data and all; returns the latter in MB."""
    peak = {stepper: measure(partial(alone, name, where, stepper)).peak_mb for stepper in WATCHED if stepper in found}
    for stepper, value in peak.items():
        found[stepper]["peak_memory_ratio"] = value / peak["plain"]
    return peak["plain"]
