"""All that is to be measured on a GPU, in one call that ends within a lease: tests, step times, trainings, profiles.

    python -m benchmarks.overhead.gpu --out DIR [--minutes 8]

The parts run one after the other, each in a process of its own and at most as long as said here or as time is left;
what a part had measured when it was ended stays. What matters most comes first. In DIR: ``gpu.md``, the tables with the
name of the card; ``gpu.json``, the results of each part by its name; ``gpu.log``, what the parts printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STEPS = "--warm-up", "21", "--rounds", "61"
OURS = "--steppers", "one query", "one query and self"
OTHERS = "the same, exact", "Opacus, gradient of each row", "Opacus, norm of each row"  # in the same run
LARGE = "--workloads", "gpt2", "resnet18"


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: Of its files.
        seconds: The most it may take.
        call: A module and its options.
    """

    name: str
    seconds: int
    call: tuple[str, ...]


def overhead(name: str, seconds: int, *options: str) -> Part:
    return Part(name, seconds, ("benchmarks.overhead", *options, *STEPS))


PARTS = (
    Part(
        "tests",
        110,
        (
            "pytest",
            "-q",
            "tests/recording/test_cuda.py",
            "tests/recording/test_cuda_processes.py",
            "tests/integrations/test_cuda.py",
        ),
    ),
    overhead("eager", 100, *LARGE, *OURS, *OTHERS),
    overhead("compiled", 110, *LARGE, *OURS, "--compile"),
    Part("trainer", 80, ("benchmarks.overhead.trainer", *LARGE, "--precisions", "bf16-mixed")),
    Part("profile", 50, ("benchmarks.overhead.profile",)),
    Part("profile-compiled", 50, ("benchmarks.overhead.profile", "--compile")),
    overhead("batch-1", 25, *LARGE, *OURS, "--batch", "1"),
    overhead("batch-8", 25, *LARGE, *OURS, "--batch", "8"),
    overhead("batch-64", 40, *LARGE, *OURS, "--batch", "64"),
    overhead("smaller", 60, "--workloads", "vit", "lora", *OURS),
)


def measured(part: Part, work: Path, device: str, seconds: float) -> str:
    """Runs a part, whose results and output go to the folder ``work``; returns how it ended, in words."""
    file = [] if part.call[0] == "pytest" else ["--device", device, "--json", str(work / f"{part.name}.json")]
    started, limit = time.monotonic(), min(seconds, part.seconds)
    with (work / f"{part.name}.log").open("w") as log:
        call, alone = [sys.executable, "-u", "-m", *part.call, *file], os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(call, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=alone)
            ended = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "ended as its time was over"
    return f"{part.name}: {ended} after {time.monotonic() - started:.0f} s"


def keep(work: Path, out: Path, words: Sequence[str]) -> str:
    """Puts what the parts have left into the three files; returns the tables."""
    names = [part.name for part in PARTS if (work / f"{part.name}.json").is_file()]
    files = [work / f"{name}.json" for name in names]
    call = [sys.executable, "-m", "benchmarks.results", *map(str, files)]
    text = subprocess.run(call, capture_output=True, text=True, check=True).stdout if files else ""
    logs = [f"== {part.name}\n{log.read_text()}" for part in PARTS if (log := work / f"{part.name}.log").is_file()]
    found = {name: json.loads(file.read_text()) for name, file in zip(names, files, strict=True)}
    (out / "gpu.json").write_text(json.dumps({"parts": list(words), **found}, indent=1))
    (out / "gpu.log").write_text("\n".join(logs))
    (out / "gpu.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to end")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="cpu: to see it work")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="these alone")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    end, words = time.monotonic() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory() as work:
        for part in PARTS:
            left = end - time.monotonic()
            if (args.parts is None or part.name in args.parts) and left > 0:
                words.append(measured(part, Path(work), args.device, left))
                print(words[-1], flush=True)
                text = keep(Path(work), args.out, words)
    print(text)


if __name__ == "__main__":
    main()
