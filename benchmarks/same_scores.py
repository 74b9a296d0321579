"""Whether two commits give the same scores: every number of G1, LDS, the overhead workloads, a demo run and BIF.

A move or a rename must not change a bit. Another order of a sum changes float32 by 1e-7, and float64 by less than
1e-12. Run it at both commits (at the earlier one with this file copied into it), then compare:

    python -m benchmarks.same_scores --write before.npz
    python -m benchmarks.same_scores --write after.npz
    python -m benchmarks.same_scores --compare before.npz after.npz
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from benchmarks import fidelity, g1
from benchmarks.lds import problems, recorded
from benchmarks.overhead import workloads
from benchmarks.recorded import recorded_step
from ine_callback import BIF, InfluenceReport, Query, Recorder, SelfQuery, bif_scores

Arrays = dict[str, NDArray[Any]]


def of_report(report: InfluenceReport) -> Arrays:
    """Every array of a report's scores."""
    fields = {each.name: getattr(report.scores, each.name) for each in dataclasses.fields(report.scores)}
    return {name: np.asarray(value) for name, value in fields.items() if name != "queries"}


def protocol(kind: str, dtype: torch.dtype = torch.float32) -> Arrays:
    """G1 with self-influence; in float64 it tells another order of a sum from another sum."""
    problem = g1.load(None)
    problem = dataclasses.replace(problem, x=problem.x.to(dtype), xq=problem.xq.to(dtype))
    run = fidelity.train(kind, 0, problem, fidelity.Setting(self_query=True))
    return {"mu": run.mu, **run.suspicion}


def lds() -> Arrays:
    """The quick form's digits."""
    return {"mu": recorded.scores(problems.load(None, "logistic", quick=True), 0)}


def overhead(name: str) -> Arrays:
    """Twenty-five steps of one of the networks whose step time is measured."""
    workload = workloads.load(name, None)
    torch.manual_seed(0)
    model = workload.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.lr)
    rows, loss_of = len(workload.x), workloads.loss_of
    queries: dict[str, Query] = {"val": Query.loss(workload.query), "self": SelfQuery()}
    recorder = Recorder(model, optimizer, rows, queries, loss_of, total_steps=25, on_error="raise")
    with recorder:
        for _ in range(25):
            chosen = torch.randperm(rows)[: workload.batch]
            batch = (workload.x[chosen], workload.y[chosen])
            recorded_step(recorder, model, optimizer, loss_of, chosen, batch)
    return of_report(recorder.report())


def demo() -> Arrays:
    """The first command of the README, for two epochs."""
    example = Path(__file__).parents[1] / "examples" / "digits.py"
    with TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, str(example), "--out", folder, "--epochs", "2"], check=True, capture_output=True
        )
        return of_report(InfluenceReport.load(folder))


def chains() -> Arrays:
    """BIF on a small network."""
    torch.manual_seed(0)
    x, y = torch.randn(120, 5), torch.randn(120)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def losses(module: Any, batch: Any) -> Any:
        return (module(batch[0])[:, 0] - batch[1]).square()

    found = bif_scores(model, (x, y), {"first": (x[:20], y[:20])}, BIF(draws=40), losses, progress=False)
    names = ("scores", "se", "p", "q", "plain", "laplace", "trend", "row_sd", "loss")
    return {name: np.asarray(getattr(found, name)) for name in names}


TASKS: dict[str, Callable[[], Arrays]] = {
    "G1, SGD": lambda: protocol("sgd"),
    "G1, AdamW": lambda: protocol("adamw"),
    "G1, SGD, float64": lambda: protocol("sgd", torch.float64),
    "G1, AdamW, float64": lambda: protocol("adamw", torch.float64),
    "LDS, logistic": lds,
    "overhead, mlp": lambda: overhead("mlp"),
    "overhead, cnn": lambda: overhead("cnn"),
    "overhead, transformer": lambda: overhead("transformer"),
    "demo": demo,
    "BIF": chains,
}


def write(path: Path, only: Sequence[str]) -> None:
    """Runs the tasks and saves their arrays."""
    torch.set_num_threads(1)
    found = {}
    for name in track([name for name in TASKS if not only or name in only], description="tasks"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.update({f"{name}/{key}": value for key, value in TASKS[name]().items()})
    np.savez_compressed(path, **found)  # type: ignore[arg-type]  # numpy's stub takes no mapping of names


def compare(before: Path, after: Path) -> bool:
    """Prints a line for every task; whether all arrays are equal in every bit."""
    one, two = np.load(before), np.load(after)
    same = set(one.files) == set(two.files)
    for task in dict.fromkeys(name.split("/")[0] for name in one.files):
        names = [name for name in one.files if name.startswith(f"{task}/") and name in two.files]
        equal = [np.array_equal(one[name], two[name], equal_nan=True) for name in names]
        error = max((difference(one[name], two[name]) for name in names), default=0.0)
        print(f"{task}: {sum(equal)} of {len(names)} arrays equal in every bit, largest difference {error:.1e}")
        same &= all(equal)
    return same


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest difference, relative to the largest number."""
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(float(np.abs(a[finite]).max()), 1e-300))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=[])
    parser.add_argument("--compare", type=Path, nargs=2)
    args = parser.parse_args(argv)
    if args.write:
        write(args.write, args.only)
    if args.compare and not compare(*args.compare):
        sys.exit(1)


if __name__ == "__main__":
    main()
