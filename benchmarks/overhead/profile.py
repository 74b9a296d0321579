"""Which operations a recording adds to an ordinary step: kernels and their time, beside the plain step's.

    python -m benchmarks.overhead.profile --json profile.json                 # CPU, one thread: operations
    python -m benchmarks.overhead.profile --device cuda --json profile.json   # kernels of the GPU
    python -m benchmarks.overhead.profile --compile --workloads gpt2 --json profile.json

Each stepper takes ``--warm-up`` steps, then ordinary steps (no curvature update, no refresh) under torch.profiler.
On a GPU an operation is a kernel or a copy, and its time that on the device; on a CPU it is an operator of torch, and
its time its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

from benchmarks.data import folder
from benchmarks.network import machine
from benchmarks.overhead import workloads
from benchmarks.overhead.steppers import DEFAULT, ORDINARY, Plain, steppers

STEPPERS = ("plain", "one query", DEFAULT)
STEPS, WARM_UP, MOST = 6, 45, 200  # profiled, before them, and at most in search of ordinary ones
SHOWN = 20  # operations in the table


@dataclass
class Operations:
    """Of some steps: how often each operation ran, and its seconds."""

    steps: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def take(self, measured: profile, cuda: bool) -> None:
        """Adds one step."""
        self.steps += 1
        for each in measured.key_averages():
            if cuda == (each.device_type.name == "CUDA"):
                time = each.self_device_time_total if cuda else each.self_cpu_time_total
                self.counts[each.key] += each.count
                self.seconds[each.key] += 1e-6 * time

    def of_step(self) -> dict[str, tuple[float, float]]:
        """Of each operation: how often in a step, and its milliseconds in all."""
        return {key: (n / self.steps, 1e3 * self.seconds[key] / self.steps) for key, n in self.counts.items()}


def of_ordinary_steps(
    make: Callable[[], Plain], workload: workloads.Workload, device: torch.device, warm_up: int, steps: int
) -> dict[str, tuple[float, float]]:
    """What a stepper's ordinary steps run; a step whose kind is another is left out."""
    stepper, found, batches = make(), Operations(), workloads.batches(workload, device)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for turn in track(range(MOST), description=workload.name):
        rows, batch = next(batches)
        if turn < warm_up:
            stepper.step(rows, batch)
            continue
        with profile(activities=activities) as measured:
            kind = stepper.step(rows, batch)
            if cuda:
                torch.cuda.synchronize()
        if kind == ORDINARY:
            found.take(measured, cuda)
        if found.steps == steps:
            break
    stepper.close()
    return found.of_step()


def compared(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, Any]:
    """Operations and milliseconds of a step of each stepper, and what each adds to the plain one, the longest first."""
    plain = found["plain"]
    out: dict[str, Any] = {}
    for name, operations in found.items():
        added = {
            key: (count - plain.get(key, (0.0, 0.0))[0], ms - plain.get(key, (0.0, 0.0))[1])
            for key, (count, ms) in operations.items()
        }
        longest = sorted(added.items(), key=lambda each: -each[1][1])
        out[name] = {
            "operations": sum(count for count, _ in operations.values()),
            "ms": sum(ms for _, ms in operations.values()),
            "added": {} if name == "plain" else {key: each for key, each in longest if any(each)},
        }
    return out


def show(what: str, found: Mapping[str, Any]) -> None:
    """One table, with the operations that add most."""
    print(f"\n{what}")
    for name, row in found.items():
        print(f"  {name:22s}{row['operations']:8.0f} operations {row['ms']:9.2f} ms")
        for key, (count, ms) in list(row["added"].items())[:SHOWN]:
            print(f"    {count:+8.1f} {ms:+9.3f} ms  {key[:90]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = workloads.parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="run every network by torch.compile, the plain one too")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before those that are profiled")
    parser.add_argument("--steps", type=int, default=STEPS, help="ordinary steps that are profiled")
    parser.add_argument("--quick", action="store_true", help="the MLP: to see it work")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    names = ["mlp"] if args.quick else args.workloads or (("gpt2", "resnet18") if args.device == "cuda" else ["mlp"])
    results: dict[str, Any] = {
        "protocol": "profile",
        "machine": machine(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread",
        "compiled": args.compile,
        "workloads": {},
    }
    for name in names:
        if lacks := workloads.missing(name):
            print(f"{name} is left out: {lacks} is not installed")
            continue
        workload = replace(workloads.load(name, folder(args.data)), compiled=args.compile)
        makers, (warm_up, steps) = steppers(workload, device, peers=False), (args.warm_up, args.steps)
        found = {
            each: of_ordinary_steps(makers[each], workload, device, *((2, 2) if args.quick else (warm_up, steps)))
            for each in STEPPERS
        }
        results["workloads"][name] = {"what": workload.what, "steppers": compared(found)}
        args.json.write_text(json.dumps(results, indent=1))
        show(workload.what, results["workloads"][name]["steppers"])


if __name__ == "__main__":
    main()
