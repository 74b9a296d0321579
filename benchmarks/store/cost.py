"""What the store adds to a training step: recordings with it and without it take steps in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.overhead import workloads
from benchmarks.overhead.__main__ import LENGTHS, timed
from benchmarks.overhead.steppers import BASIS, KINDS, LOOK, REFRESH, Plain, Recorded, planned_kinds
from ine_callback import GradientStore

ROUNDS = {"mlp": 1000, "cnn": 180, "transformer": 180, "gpt2-float": 26}
QUICK = 25
WITHOUT, WITH = "one query", "one query and the store"
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
    makers = {
        "plain": lambda: Plain(workload, device),
        WITHOUT: lambda: Recorded(workload, device, query),
        WITH: lambda: Stored(workload, device, query, store=GradientStore(working=working)),
    }
    rounds = QUICK if quick else ROUNDS[name]
    found = timed(workload, device, rounds, makers, [])
    steppers = found["steppers"]
    numbers = GradientStore(working=working).entries(len(workload.x))
    return {
        "what": f"{found['what']}, {len(workload.x):,} rows, {numbers:,} numbers",
        "plain_ms": found["plain_ms"],
        "rounds": rounds,
        "steppers": steppers,
        "added": added(steppers[WITHOUT], steppers[WITH])
        | {"all steps": steppers[WITH]["mean"] - steppers[WITHOUT]["mean"]},
    }


def added(without: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, float]:
    """What the store adds to each kind of step, and to each step of runs of some lengths, in plain steps."""
    found = {}
    for kind in (kind for kind in KINDS if kind in stored):
        base = REFRESH if kind == BASIS else kind
        if base in without:
            found[kind] = stored[kind]["ratio"] - without[base]["ratio"]
    dearest = {REFRESH: BASIS, BASIS: REFRESH}  # where one was not met, the other's stands for it
    for n in LENGTHS:
        if LOOK in found and (REFRESH in found or BASIS in found):
            each = (found.get(kind, found.get(dearest.get(kind, ""))) for kind in islice(kinds_of_store(), n))
            found[f"{n} steps"] = sum(cost for cost in each if cost is not None) / n
    return found
