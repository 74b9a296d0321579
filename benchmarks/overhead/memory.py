"""Peak memory of a stepper: on a GPU beside the others, on the CPU in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
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


def alone(name: str, where: Path | None, batch: int | None, stepper: str) -> None:
    """Some steps of one stepper on the CPU, two refreshes among them, in a process whose memory is watched."""
    workload, device = workloads.load(name, where).in_batches_of(batch), torch.device("cpu")
    taken = steppers(workload, device, peers=False)[stepper]()
    for rows, held in islice(workloads.batches(workload, device), STEPS_ALONE):
        taken.step(rows, held)
    taken.close()


def on_the_host(name: str, where: Path | None, batch: int | None, found: dict[str, Any]) -> float:
    """Fills in each stepper's peak of memory by the plain one's, data and all; returns the latter in MB."""
    peak = {
        stepper: measure(partial(alone, name, where, batch, stepper)).peak_mb for stepper in WATCHED if stepper in found
    }
    for stepper, value in peak.items():
        found[stepper]["peak_memory_ratio"] = value / peak["plain"]
    return peak["plain"]
