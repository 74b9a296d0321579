"""Do scores foretell retraining: half of the rows left out (LDS), single rows left out, beside other libraries.

    python -m benchmarks.lds --problems g2 --json lds-g2.json --data DIR --truth 'truth-{problem}.pt'

60 random halves of the rows are retrained four times each. The linear data-modelling score (LDS) of a query is
Spearman's correlation over the halves between its mean outcome and minus the sum of the rows' scores; every query is
posed twice, as the loss of a held-out row and as its negated margin. ``--left-out R`` also retrains without each of 50
rows, R times, each beside the equal training with it. Problems:

    g2           MLP 784-128-64-10 on 5,000 MNIST digits, 50 epochs: losses near 0, saturated queries (protocol G2)
    mlp          the same with dropout .1: dattri's MNIST-MLP
    logistic     logistic regression, 20 epochs: dattri's MNIST-LR
    cnn          two convolutions on 2,000 digits, 15 epochs
    transformer  characters of Shakespeare, 1,000 rows of 32, AdamW, 15 epochs
    diabetes     regression, MLP 10-32-32-1, 380 rows, AdamW, 10 epochs; the "margin" is the prediction
    friedman     regression, MLP 10-64-1, 1,000 rows, SGD with momentum, 20 epochs

BIF is one run of chains, with default settings, around one trained network: its scores, and their Laplace term. The
other methods come from the package index (``pip install -e ".[peers]"``) and are left out where they are missing.
Seconds are CPU seconds of one thread, with the training of the models a score needs; megabytes what a score's process
had at its peak above what it started with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from benchmarks.data import folder
from benchmarks.lds import chains, peers, problems, recorded, retrain
from benchmarks.lds.measure import Measured, measure
from benchmarks.lds.problems import Problem
from benchmarks.lds.retrain import Stacked
from benchmarks.metrics import Floats, per_query_spearman
from benchmarks.network import machine
from ine_callback import BIF

KINDS = ("loss", "margin")
LIBRARIES = {"dattri": "dattri", "traker": "trak"}  # with the module to import
OURS = "ine_callback, one run"
LEFT_OUT, CHECKPOINTS = 50, 10
QUICK = BIF(chains=2, draws=8, batch_size=32, curvature_rows=16)
SEED = 7  # of the networks that are judged without a record of their training


class Truth(NamedTuple):
    """Outcomes [2, subsets, runs, Q] on halves; changes [2, rows, runs, Q] without single rows, if asked for."""

    halves: Floats
    rows: torch.Tensor
    left_out: Floats | None

    def reliability(self) -> dict[str, float]:
        """Correlation of two halves of the retrainings' rankings, for losses and margins."""
        found = {}
        for name, values in (("lds", self.halves), ("loo", self.left_out)):
            if values is not None and values.shape[2] > 1:
                middle = values.shape[2] // 2
                for kind, v in zip(KINDS, values, strict=True):
                    found[f"{name}_{kind}"] = per_query_spearman(v[:, :middle].mean(1), v[:, middle:].mean(1))
        return found

    def judge(self, mu: Floats, subsets: torch.Tensor) -> dict[str, float]:
        """LDS, and Spearman over the rows left out, of scores [2, N, Q]."""
        found = {}
        for kind, scores, outcome in zip(KINDS, mu, self.halves.mean(2), strict=True):
            found[f"lds_{kind}"] = per_query_spearman(-np.stack([scores[s.numpy()].sum(0) for s in subsets]), outcome)
        if self.left_out is not None:
            for kind, scores, change in zip(KINDS, mu, self.left_out.mean(2), strict=True):
                found[f"loo_{kind}"] = per_query_spearman(scores[self.rows.numpy()], change)
        return found


def ours(
    problem: Problem, seeds: Sequence[int], judge: Callable[[Floats], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """Rows of the table: one run (mean over seeds), the mean of all runs' scores, and one run without discount."""
    runs = [measure(partial(recorded.scores, problem, seed)) for seed in seeds]
    each = [judge(run.result) for run in runs]
    cost = {
        "seconds": float(np.median([r.seconds for r in runs])),
        "peak_mb": float(np.median([r.peak_mb for r in runs])),
    }
    mean = {key: float(np.mean([e[key] for e in each])) for key in each[0]}
    yield {
        "name": "ine_callback, one run",
        "models": 1,
        **mean,
        **cost,
        "seeds": {k: [e[k] for e in each] for k in mean},
    }
    if len(runs) > 1:
        together = judge(np.mean([run.result for run in runs], 0))
        cost["seconds"] *= len(runs)
        yield {"name": "ine_callback, mean of the runs", "models": len(runs), **together, **cost}
    first = measure(partial(recorded.scores, problem, seeds[0], discount=False))
    yield row("ine_callback, discount off", 1, first, judge)


def row(name: str, models: int, found: Measured[Floats], judge: Callable[[Floats], dict[str, float]]) -> dict[str, Any]:
    """A row of the table."""
    return {"name": name, "models": models, **judge(found.result), "seconds": found.seconds, "peak_mb": found.peak_mb}


def bayesian(problem: Problem, bif: BIF, judge: Callable[[Floats], dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Rows of the table for BIF, its scores with the checks' verdict; one run around one network makes both."""
    started = time.process_time()
    end = retrain.last(retrain.train(problem, torch.arange(len(problem.x))[None], SEED))
    training = time.process_time() - started
    found = measure(partial(chains.scores, problem, end, bif))
    for name, estimate in zip(chains.NAMES, found.result.estimates, strict=True):
        both = Measured(estimate, found.seconds + training, found.peak_mb)
        # the Laplace term has no chains that could fail
        yield row(name, 1, both, judge) | (found.result.verdict if name == chains.NAMES[0] else {})


class Networks(NamedTuple):
    """The trained networks [models, ...], and the first one's checkpoints [checkpoints, ...]."""

    end: Stacked
    trajectory: Stacked


def kept(problem: Problem) -> set[int]:
    """The epochs after which a checkpoint is kept, evenly spread."""
    spread = np.linspace(problem.epochs / CHECKPOINTS, problem.epochs, CHECKPOINTS).round()
    return {int(epoch) - 1 for epoch in spread}


def networks(problem: Problem, models: int) -> Networks:
    """Trains on all rows."""
    epochs, checkpoints = kept(problem), []
    states = retrain.train(problem, torch.arange(len(problem.x)).expand(models, -1), SEED)
    for epoch in track(range(problem.epochs), description=f"{problem.name}: {models} models"):
        end = next(states)
        if epoch in epochs:
            checkpoints.append({k: v[0].clone() for k, v in end.items()})
    return Networks(end, {k: torch.stack([c[k] for c in checkpoints]) for k in end})


def others(
    problem: Problem, sizes: Sequence[int], wanted: Callable[[str], bool], judge: Callable[[Floats], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """Rows of the table for the other libraries; those for one model all judge the same one."""

    def influence(function: Callable[..., Floats], damping: float) -> Callable[[Networks], Callable[[], Floats]]:
        return lambda n: partial(function, problem, n.end, damping)

    def traker(models: int) -> Callable[[Networks], Callable[[], Floats]]:
        return lambda n: partial(peers.traker, problem, n.end, models)

    def trak(models: int, dimensions: int) -> Callable[[Networks], Callable[[], Floats]]:
        return lambda n: partial(peers.trak, problem, n.end, models, dimensions)

    methods: list[tuple[str, int, Callable[[Networks], Callable[[], Floats]]]] = [
        (f"dattri TracIn, {len(kept(problem))} checkpoints", 1, lambda n: partial(peers.tracin, problem, n.trajectory)),
        *(
            (f"dattri {name}, damping {d:g}", 1, influence(function, d))
            for name, function in (("IF-CG", peers.influence_cg), ("IF-EK-FAC", peers.influence_ekfac))
            for d in peers.DAMPING
        ),
        *((f"dattri TRAK-{m}, {d} dimensions", m, trak(m, d)) for m in sizes for d in problem.projections),
    ]
    if not problem.y.is_floating_point():  # traker knows classes
        methods += [(f"traker TRAK-{m}", m, traker(m)) for m in sizes[:2]]
    methods = [method for method in methods if wanted(method[0])]
    if not methods:
        return
    started = time.process_time()
    trained = networks(problem, max(sizes))
    training = (time.process_time() - started) / max(sizes)
    for name, models, method in methods:
        try:
            found = measure(method(trained))
        except Exception as failure:  # a library's failure is a result
            yield {"name": name, "models": models, "failed": f"{type(failure).__name__}: {failure}"}
        else:
            yield row(name, models, replace(found, seconds=found.seconds + models * training), judge)


def show(found: dict[str, Any]) -> None:
    """Prints a row of the table."""
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float))
    print(
        f"{found['protocol']:12s}{found['name']:36s}models {found['models']:<3d} {numbers or found['failed']}",
        *found.get("reasons", ()),
        sep="\n    ",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else what scikit-learn brings along")
    parser.add_argument("--problems", nargs="+", choices=problems.NAMES, default=problems.NAMES)
    parser.add_argument("--truth", help="file that keeps a problem's truth, e.g. 'truth-{problem}.pt'")
    parser.add_argument("--runs", type=int, default=4, help="trainings a half for the truth")
    parser.add_argument("--left-out", type=int, default=0, help="trainings without each of 50 rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="seeds of the one-run estimates")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 10, 50], help="ensembles of TRAK")
    parser.add_argument("--only", default="", help="part of the names of the scores wanted, e.g. run, BIF or TRAK")
    parser.add_argument(
        "--quick", action="store_true", help="few rows and epochs, one seed, no kept truth: to see it work"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = folder(args.data)
    missing = [name for name, module in LIBRARIES.items() if not importlib.util.find_spec(module)]
    if missing:
        print(f'not installed, and left out: {", ".join(missing)} (pip install -e ".[peers]")')
    sizes = args.models[:1] if args.quick else args.models
    results: dict[str, Any] = {
        "protocol": "lds",
        "data": "scikit-learn's" if where is None else "MNIST, Shakespeare",
        "machine": machine(),
        "problems": {},
        "rows": [],
    }
    for name in args.problems:
        problem = problems.load(where, name, args.quick)
        file = None if args.quick or args.truth is None else Path(args.truth.format(problem=name))
        halves = retrain.halves(problem, 2 if args.quick else args.runs, file).numpy()
        rows = torch.randperm(len(problem.x), generator=torch.Generator().manual_seed(13))[:LEFT_OUT]
        changes = retrain.left_out(problem, rows, args.left_out).numpy() if args.left_out else None
        truth = Truth(halves, rows, changes)
        results["problems"][name] = {
            "what": problem.what,
            **{"rows": len(problem.x), "queries": len(problem.xq), "epochs": problem.epochs},
            **{"runs": halves.shape[2], "left_out": args.left_out, "reliability": truth.reliability()},
        }
        print(name, results["problems"][name])
        judge = partial(truth.judge, subsets=problem.subsets)
        found = []
        if args.only in OURS:
            found.append(ours(problem, args.seeds[:1] if args.quick else args.seeds, judge))
        if any(args.only in name for name in chains.NAMES):
            found.append(bayesian(problem, QUICK if args.quick else BIF(), judge))
        found.append(others(problem, sizes, lambda name: args.only in name and name.split()[0] not in missing, judge))
        for line in (line for lines in found for line in lines):
            results["rows"].append({"protocol": name, **line})
            show(results["rows"][-1])
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
