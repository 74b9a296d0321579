"""What the store adds to a training step: recordings with it and without it take steps in turn.

GPT-2 small's steps vary by more than the store costs, and three of it do not fit into 24 GB. There the CPU seconds
inside of the store's own calls are added up, in one recording beside the plain training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.overhead import workloads
from benchmarks.overhead.__main__ import LENGTHS, WARM_UP, timed
from benchmarks.overhead.steppers import BASIS, KINDS, LOOK, REFRESH, Plain, Recorded, planned_kinds
from ine_callback import GradientStore

ROUNDS = {"mlp": 400, "cnn": 110, "transformer": 110, "gpt2-float": 24}
INSIDE = ("gpt2-float",)  # whose store's calls are timed
QUICK = 25
WITHOUT, WITH = "one query", "one query and the store"
CALLS = [("compression", name) for name in ("refresh", "take", "settle")] + [("vectors", "update")]  # its own calls
FEW = 2040  # numbers of a row during the run, as few as the default ever has: what a user can choose instead


class Stored(Recorded):
    """With a store; a refresh that makes its basis anew is a kind of step of its own."""

    def step(self, rows: Tensor, batch: tuple[Tensor, Tensor]) -> str:
        assert self.recorder.store is not None
        before = self.recorder.store.compression.bases
        kind = super().step(rows, batch)
        if failure := self.recorder.store.failure:
            raise RuntimeError(failure)
        return kind if self.recorder.store.compression.bases is before else BASIS


class Watched(Stored):
    """With the CPU seconds that each step spends inside of the store."""

    def __init__(self, workload: workloads.Workload, device: torch.device, queries: Any) -> None:
        super().__init__(workload, device, queries, store=GradientStore())
        self.inside: list[tuple[str, float]] = []
        self._seconds = 0.0
        store = self.recorder.store
        assert store is not None
        for owner, name in CALLS:
            part = store.compression if owner == "compression" else store.vectors
            setattr(part, name, self._watched(getattr(part, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.process_time()
            found = function(*args)
            self._seconds += time.process_time() - started
            return found

        return call

    def step(self, rows: Tensor, batch: tuple[Tensor, Tensor]) -> str:
        self._seconds = 0.0
        kind = super().step(rows, batch)
        self.inside.append((kind, self._seconds))
        return kind


def kinds_of_store() -> Iterator[str]:
    """What the planned cadence makes of each step of a run: the basis is made anew when steps have doubled."""
    made = 0
    for step, kind in enumerate(planned_kinds()):
        anew = kind == REFRESH and step >= 2 * made
        made = max(1, step) if anew else made
        yield BASIS if anew else kind


def of_step(name: str, where: Path | None, quick: bool, working: int | None = None) -> dict[str, Any]:
    """Steps by the plain step, and the difference that the store makes, by kind of step."""
    workload, device = workloads.load(name, where), torch.device("cpu")
    query = {"val": workload.query}
    if name in INSIDE:
        return inside(workload, device, query, QUICK if quick else ROUNDS[name])
    makers = {
        "plain": lambda: Plain(workload, device),
        WITHOUT: lambda: Recorded(workload, device, query),
        WITH: lambda: Stored(workload, device, query, store=GradientStore(working=working)),
    }
    rounds = QUICK if quick else ROUNDS[name]
    found = timed(workload, device, rounds, makers, [])
    steppers = found["steppers"]
    return {
        "what": what(workload, working),
        "plain_ms": found["plain_ms"],
        "rounds": rounds,
        "steppers": steppers,
        "added": added(steppers[WITHOUT], steppers[WITH]),
    }


def inside(workload: workloads.Workload, device: torch.device, query: Any, rounds: int) -> dict[str, Any]:
    """The same by the store's own calls; of each kind of step the median, in plain steps."""
    made: list[Watched] = []

    def watched() -> Watched:
        made.append(Watched(workload, device, query))
        return made[0]

    found = timed(workload, device, rounds, {"plain": lambda: Plain(workload, device), WITH: watched}, [])
    plain = found["plain_ms"] / 1e3
    steps = made[0].inside[WARM_UP:]
    by_kind = {kind: [seconds for k, seconds in steps if k == kind] for kind in KINDS}
    ratios = {kind: float(np.median(each)) / plain for kind, each in by_kind.items() if each}
    return {
        "what": what(workload, None),
        "plain_ms": found["plain_ms"],
        "rounds": rounds,
        "inside": {kind: [seconds / plain for seconds in each] for kind, each in by_kind.items()},
        "steppers": found["steppers"],
        "added": ratios | over_runs(ratios),
    }


def what(workload: workloads.Workload, working: int | None) -> str:
    """The training and its store, in words."""
    numbers = GradientStore(working=working).entries(len(workload.x))
    return f"{workload.what}, {len(workload.x):,} rows, {numbers:,} numbers"


def added(without: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, float]:
    """What the store adds to each kind of step, and to each step of runs of some lengths, in plain steps."""
    found: dict[str, float] = {}
    for kind in (kind for kind in KINDS if kind in stored):
        base = REFRESH if kind == BASIS else kind
        if base in without:
            found[kind] = stored[kind]["ratio"] - without[base]["ratio"]
    return found | over_runs(found) | {"all steps": stored["mean"] - without["mean"]}


def over_runs(added: Mapping[str, float]) -> dict[str, float]:
    """What is added to each step of runs of some lengths; of a refresh and one with a new basis one stands for both."""
    both = [added[kind] for kind in (REFRESH, BASIS) if kind in added]
    if LOOK not in added or not both:
        return {}
    each = {REFRESH: both[0], BASIS: both[-1]} | dict(added)
    return {f"{n} steps": sum(each[kind] for kind in islice(kinds_of_store(), n)) / n for n in LENGTHS}
