"""What a recording costs: steps with it and without it, in turn.

    python -m benchmarks.overhead --json overhead.json [--data DIR]           # CPU, one thread
    python -m benchmarks.overhead --json overhead.json --device cuda          # GPT-2 small, ResNet-18, ViT-S, LoRA
    python -m benchmarks.overhead --compile --json compiled.json              # every network run by torch.compile
    python -m benchmarks.overhead --knobs --json knobs.json                   # what each knob saves and costs
    python -m benchmarks.overhead --workloads gpt2-short --steppers "one query" "one query and self" --warm-up 21
        --rounds 45 --json gpt2.json --data DIR                               # GPT-2 small on a CPU: needs transformers

Every stepper has a network of its own, the same at the start and fed the same rows; in each round every stepper takes
one step, so that all meet the same load. CPU times are CPU seconds of one thread, GPU times wall-clock from one
synchronisation to the next. A recording has three kinds of steps: ordinary ones; those that look at the curvature too;
and refreshes of the directions. The last two become rare (``ine_callback/cadence.py``), so the table gives the ratio of
each kind's median to the plain step's, with a 95 % interval by bootstrap, and what follows for whole runs of 1,000 to
100,000 steps. Peak memory is a stepper's own on a GPU; on the CPU that of a process of its own, data and all, above
what its imports take. ``fidelity`` compares the scores of the default with those of the exact mode on the same rows:
Spearman, and the error's standard deviation by the scores'.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.stats import spearmanr

from benchmarks.data import folder
from benchmarks.network import machine
from benchmarks.overhead import workloads
from benchmarks.overhead.memory import Memory, on_the_host
from benchmarks.overhead.steppers import (
    DEFAULT,
    EXACT,
    KINDS,
    LOOK,
    ORDINARY,
    REFRESH,
    Plain,
    Recorded,
    planned_kinds,
    steppers,
    trainable,
    turned,
)

LENGTHS = (1_000, 10_000, 100_000)
SLOW, SLOW_ROUNDS = "one backward pass a row", 3
WARM_UP = 3


class Clock:
    """Seconds of one step: of the CPU, or of the GPU between two events."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def timed(
    workload: workloads.Workload,
    device: torch.device,
    rounds: int,
    makers: Mapping[str, Callable[[], Plain]],
    compared: Sequence[str],
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Seconds of every stepper's steps, by kind, the peak memory of each, and some steppers' fidelity to exact."""
    made: dict[str, Plain] = {}
    memory = Memory(device)
    for name, make in makers.items():
        try:
            with memory.of(name):
                made[name] = make()
        except Exception as error:
            print(f"{workload.name}: {name} is left out ({type(error).__name__}: {error})")
    seconds: dict[str, list[tuple[str, float]]] = {name: [] for name in made}
    clock, batches = Clock(device), workloads.batches(workload, device)
    for turn in track(range(rounds), description=workload.name):
        rows, batch = next(batches)
        for name in list(made)[turn % 2 :: 2] + list(made)[1 - turn % 2 :: 2]:
            if name == SLOW and turn >= SLOW_ROUNDS + warm_up:
                continue
            before = clock.now()
            try:
                with memory.of(name):
                    kind = made[name].step(rows, batch)
            except Exception as error:
                print(f"{workload.name}: {name} is left out ({type(error).__name__}: {error})")
                del made[name], seconds[name]
                continue
            if turn >= warm_up:
                seconds[name].append((kind, clock.now() - before))
    found = {name: summary(seconds[name], seconds["plain"]) for name in made}
    for name, value in memory.peak.items():
        if name in found:
            found[name]["peak_memory_ratio"] = value / memory.peak["plain"]
    out = {
        "what": workload.what,
        "parameters": trainable(made["plain"].model),
        "plain_ms": 1e3 * float(np.median([s for _, s in seconds["plain"]])),
        "steppers": found,
        "fidelity": {name: fidelity(made[name], made[EXACT]) for name in compared if {name, EXACT} <= made.keys()},
    }
    for stepper in made.values():
        stepper.close()
    return out


def summary(steps: Sequence[tuple[str, float]], plain: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Ratios to the plain step: of the mean, of the median by kind, with its interval, and for runs of some lengths."""
    base = np.array([s for _, s in plain])
    found: dict[str, Any] = {"mean": float(np.mean([s for _, s in steps]) / base.mean())}
    for kind in KINDS:
        own = np.array([s for k, s in steps if k == kind])
        if own.size:
            g = np.random.default_rng(0)
            draws = [np.median(g.choice(own, own.size)) / np.median(g.choice(base, base.size)) for _ in range(400)]
            ratio = float(np.median(own) / np.median(base))
            found[kind] = {"ratio": ratio, "interval": np.quantile(draws, [0.025, 0.975]).tolist(), "steps": own.size}
    if LOOK in found and REFRESH in found:
        found["runs"] = {n: sum(found[kind]["ratio"] for kind in islice(planned_kinds(), n)) / n for n in LENGTHS}
    return found


def fidelity(default: Plain, exact: Plain) -> dict[str, Any]:
    """Scores of the default mode against those of the exact one."""
    assert isinstance(default, Recorded) and isinstance(exact, Recorded)
    ours, truth = default.report().scores, exact.report().scores
    found = {}
    for k, query in enumerate(truth.queries):
        seen = np.isfinite(truth.mu[:, k]) & np.isfinite(ours.mu[:, k])
        a, b = ours.mu[seen, k], truth.mu[seen, k]
        found[query.name] = {
            "spearman": float(spearmanr(a, b)[0]),
            "relative_error": float((a - b).std() / b.std()),
            "visits_a_row": float(truth.observations[seen].mean()),
        }
    retained = default.recorder.signals.retained_variance
    return {"queries": found, "kept_share": None if retained is None else float(retained)}


def show(name: str, found: dict[str, Any]) -> None:
    """One table."""
    print(f"\n{found['what']}: {found['parameters']:,} parameters, plain step {found['plain_ms']:.1f} ms")
    for stepper, row in found["steppers"].items():
        kinds = "  ".join(
            f"{kind} {row[kind]['ratio']:.2f} ({row[kind]['interval'][0]:.2f}-{row[kind]['interval'][1]:.2f})"
            for kind in (ORDINARY, LOOK, REFRESH)
            if kind in row
        )
        runs = "  ".join(f"{int(n):,} steps {ratio:.2f}" for n, ratio in row.get("runs", {}).items())
        memory = f"  memory {row['peak_memory_ratio']:.2f}" if "peak_memory_ratio" in row else ""
        print(f"  {stepper:30s}{kinds}  {runs}{memory}")
    for stepper, each in found["fidelity"].items():
        print(f"  {stepper} against exact: {each}")


def flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The options that change what is measured, as they were given."""
    given = []
    for name in ("device", "batch", "steppers", "warm_up", "rounds"):
        if (value := getattr(args, name)) != parser.get_default(name):
            values = [value] if isinstance(value, str | int) else value
            given.append(" ".join([f"--{name.replace('_', '-')}", *(shlex.quote(str(each)) for each in values)]))
    return " ".join([*given, *(["--compile"] if args.compile else [])])


def main(argv: Sequence[str] | None = None) -> None:
    parser = workloads.parser(__doc__)
    parser.add_argument("--steppers", nargs="+", help="these beside the plain one; all by default")
    parser.add_argument("--batch", type=int, help="rows in a batch; the workload's own by default")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps of every stepper that are not timed")
    parser.add_argument("--rounds", type=int, default=200, help="steps of every stepper")
    parser.add_argument("--no-peers", action="store_true", help="our own steppers alone")
    parser.add_argument("--compile", action="store_true", help="run every network by torch.compile, the plain one too")
    parser.add_argument("--no-memory", action="store_true", help="not the peak memory of processes of their own")
    parser.add_argument("--knobs", action="store_true", help="the MLP and the transformer with the knobs turned")
    parser.add_argument("--quick", action="store_true", help="25 steps of the MLP: to see it work")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    usual = ("mlp", "transformer") if args.knobs else workloads.CUDA if device.type == "cuda" else workloads.CPU
    names = ["mlp"] if args.quick else args.workloads or usual
    where = folder(args.data)
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    results: dict[str, Any] = {
        "protocol": "knobs" if args.knobs else "overhead",
        "machine": machine(),
        "device": card or "CPU, one thread",
        "compiled": args.compile,
        "flags": flags(args, parser),
    }
    results["workloads"] = {}
    for name in names:
        if lacks := workloads.missing(name):
            print(f"{name} is left out: {lacks} is not installed")
            continue
        workload, rounds = workloads.load(name, where), 25 if args.quick else args.rounds
        workload = replace(workload, compiled=args.compile).in_batches_of(args.batch)
        if args.knobs:
            makers = turned(workload, device, rounds)
            found = timed(workload, device, rounds, makers, [*makers][1:])
        else:
            makers = steppers(workload, device, not args.no_peers)
            makers = {k: make for k, make in makers.items() if not args.steppers or k in ["plain", *args.steppers]}
            found = timed(workload, device, rounds, makers, [DEFAULT], args.warm_up)
        if device.type == "cpu" and not (args.quick or args.knobs or args.compile or args.no_memory):
            found["plain_peak_mb"] = on_the_host(name, where, args.batch, found["steppers"])
        results["workloads"][name] = found
        args.json.write_text(json.dumps(results, indent=1))
        show(name, found)


if __name__ == "__main__":
    main()
