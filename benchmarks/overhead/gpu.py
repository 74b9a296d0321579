"""All that is to be measured on a GPU, in one call that ends within a lease: tests, step times, trainings, profiles.

    python -m benchmarks.overhead.gpu --out DIR [--minutes 8]

The parts run one after the other, each in a process of its own and at most as long as said here or as time is left;
what a part had measured when it was ended stays. What matters most comes first. In DIR: ``gpu.md``, the tables with the
name of the card; ``gpu.json``, the results of each part by its name; ``gpu.log``, what the parts printed. Ends with 1
where a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = "--warm-up", "21", "--rounds", "61"
OURS = "--steppers", "one query", "one query and self"
OTHERS = "the same, exact", "Opacus, gradient of each row", "Opacus, norm of each row"  # in the same run
LARGE = "--workloads", "gpt2", "resnet18"
TESTS = "recording/test_cuda.py", "recording/test_cuda_processes.py", "integrations/test_cuda.py"


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
    Part("tests", 110, ("pytest", "-q", *(f"tests/{file}" for file in TESTS))),
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


def measured(part: Part, work: Path, device: str, seconds: float) -> int | None:
    """Runs a part, whose results and output go to the folder ``work``; its exit status, None: its time was over."""
    file = [] if part.call[0] == "pytest" else ["--device", device, "--json", str(work / f"{part.name}.json")]
    call, alone = [sys.executable, "-u", "-m", *part.call, *file], os.environ | {"OMP_NUM_THREADS": "1"}
    with (work / f"{part.name}.log").open("w") as log:
        try:
            limit = min(seconds, part.seconds)
            return subprocess.run(call, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=alone).returncode
        except subprocess.TimeoutExpired:
            return None


def keep(work: Path, out: Path, ended: Mapping[str, str]) -> str:
    """Puts what the parts have left into the three files; returns the tables."""
    logs = [f"== {name}: {words}\n{(work / f'{name}.log').read_text()}" for name, words in ended.items()]
    (out / "gpu.log").write_text("\n".join(logs))
    found: dict[str, Any] = {"parts": ended}
    for name in ended:
        with contextlib.suppress(OSError, ValueError):  # none, or ended while it was written
            found[name] = json.loads((work / f"{name}.json").read_text())
    (out / "gpu.json").write_text(json.dumps(found, indent=1))
    files = [str(work / f"{name}.json") for name in ended if name in found]
    call = [sys.executable, "-m", "benchmarks.results", *files]
    text = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout if files else ""
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
    end, ended, text, failed = time.monotonic() + 60 * args.minutes, dict[str, str](), "", False
    with tempfile.TemporaryDirectory() as work:
        for part in PARTS:
            left = end - time.monotonic()
            if (args.parts is None or part.name in args.parts) and left > 0:
                status = measured(part, Path(work), args.device, left)
                words = "its time was over" if status is None else f"exit status {status}"
                ended[part.name] = f"{words} after {left - (end - time.monotonic()):.0f} s"
                failed |= bool(status)
                print(f"{part.name}: {ended[part.name]}", flush=True)
                text = keep(Path(work), args.out, ended)
    print(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
