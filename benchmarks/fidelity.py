"""How close one run's scores come to the truth of retraining (protocol G1, see g1.py).

    python -m benchmarks.fidelity --json fidelity.json --data DIR --truth 'truth-{optimizer}.pt'

A bare PyTorch loop with a Recorder, 200 queries (each the loss of one held-out row), SGD and AdamW: the default beside
its alternatives, and self-influence against leaving single rows out; or with ``--sweep`` how often the directions are
refreshed and how often the curvature is observed. ``--family`` leads to benchmarks.fidelity_family: the same question,
asked of many trainings instead of one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import g1
from benchmarks.data import folder
from benchmarks.metrics import Floats, agreement, auroc, over_seeds
from benchmarks.network import RowLosses, cross_entropy, machine, network
from benchmarks.recorded import recorded_step
from ine_callback import Recorder
from ine_callback.curvature.low_rank import RANK
from ine_callback.methods.fine.fine import FINE
from ine_callback.queries import Query, SelfQuery
from ine_callback.utilities.options import InitialWeights

REFRESHES = (1, 5, 10, 20, 40)


@dataclass(frozen=True)
class Setting:
    """How a run is recorded; the intervals are the package's defaults."""

    refresh_every: int | None = None
    discount: bool = True
    curvature_every: int | None = None
    rank: int | None = RANK
    self_query: bool = False
    reservoir: int = 800
    initial_weights: InitialWeights = "random"
    method: Callable[[], FINE] = FINE


class StepwiseFINE(FINE):
    """Every step's shifts in units of that step's own noise, summed and divided by sqrt(T): no step weighs more."""

    def update(
        self, rows: Tensor, signals: Tensor, rate: float, unit: Tensor | None = None, *more: Tensor | None
    ) -> None:
        super().update(rows, signals / signals.std(0), 1.0)


class SummedFINE(FINE):
    """Self-influence as the plain sum over the steps, in units: no ratio to the batch."""

    def _level(self, rows: Tensor, mean: Tensor) -> Tensor:
        level = torch.ones_like(self._state["noise"])
        self._state["profile"].index_add_(0, rows, level[self._self_columns].expand(rows.shape[0], -1))
        return level


RUN_ALONE = functools.partial(FINE, closing=False)
ALTERNATIVES = {
    "default": Setting(self_query=True),
    "run alone": Setting(self_query=True, method=RUN_ALONE),
    "nothing in low rank": Setting(rank=None, self_query=True, method=RUN_ALONE),
    "discount by K-FAC alone": Setting(reservoir=0, method=RUN_ALONE),
    "noise of the rows' order alone": Setting(initial_weights="fixed", method=RUN_ALONE),
    "discount off (first order)": Setting(discount=False),
    "each step in its own noise": Setting(initial_weights="fixed", method=lambda: StepwiseFINE(closing=False)),
    "estimator auc": Setting(method=functools.partial(FINE, "auc")),
    "estimator max_threshold": Setting(method=functools.partial(FINE, "max_threshold")),
}
SELF = "self-influence"
OWN = {
    SELF: Setting(self_query=True),
    f"{SELF}, discount off": Setting(discount=False, self_query=True),
    f"{SELF}, summed over steps": Setting(self_query=True, method=SummedFINE),
}


@dataclass(frozen=True)
class Run:
    """One run: scores [N, Q], suspicions [N] that need no query, and the CPU seconds it took."""

    mu: Floats
    suspicion: dict[str, Floats]
    seconds: float


def train(kind: str, seed: int, problem: g1.Problem, setting: Setting | None) -> Run:
    """Trains once; without a setting nothing is recorded and only the CPU seconds count (other processes do not)."""
    g = torch.Generator().manual_seed(seed)
    model = network(g).to(problem.x.dtype)
    optimizer, scheduler = g1.make_optimizer(kind, model.parameters(), g1.STEPS)
    recorder = None if setting is None else make_recorder(model, optimizer, scheduler, problem, setting)
    started = time.process_time()
    if recorder is not None:
        recorder.start()
    for _ in range(g1.EPOCHS):
        order = torch.randperm(g1.ROWS, generator=g)
        for rows in order.split(g1.BATCH):
            batch = (problem.x[rows], problem.y[rows])
            if recorder is not None:
                recorded_step(recorder, model, optimizer, cross_entropy, rows, batch, scheduler)
                continue
            cross_entropy(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    seconds = time.process_time() - started
    if recorder is None or setting is None:
        return Run(np.empty((0, 0)), {}, seconds)
    recorder.stop()
    return read(recorder, model, problem, setting, seconds)


def make_recorder(model: nn.Module, optimizer: Any, scheduler: Any, problem: g1.Problem, setting: Setting) -> Recorder:
    queries: dict[str, Query] = {"row": RowLosses(problem.xq, problem.yq)}
    if setting.self_query:
        queries["self"] = SelfQuery()
    return Recorder(
        model,
        optimizer,
        rows=g1.ROWS,
        queries=queries,
        loss=cross_entropy,
        methods=[setting.method()],
        total_steps=g1.STEPS,
        schedulers=[] if scheduler is None else [(scheduler, 1)],
        refresh_every=setting.refresh_every,
        curvature_every=setting.curvature_every,
        rank=setting.rank,
        discount=setting.discount,
        reservoir=setting.reservoir,
        initial_weights=setting.initial_weights,
        on_error="raise",
    )


def read(recorder: Recorder, model: nn.Module, problem: g1.Problem, setting: Setting, seconds: float) -> Run:
    """The scores, and the two baselines that cost nothing."""
    scores = recorder.report().scores
    with torch.no_grad():
        final = F.cross_entropy(model(problem.x), problem.y, reduction="none").double().numpy()
    suspicion = {"final loss": final, "mean loss in the run": scores.mean_loss}
    if setting.self_query:
        suspicion[SELF] = scores.mu[:, -1]
    return Run(scores.mu[:, : g1.QUERIES], suspicion, seconds)


def judge(runs: Sequence[Floats], truth: g1.Truth, problem: g1.Problem) -> dict[str, Any]:
    """All measures of the scores [N, Q] of several seeds."""
    groups = [group.numpy() for group in problem.groups]
    each = [agreement(mu, truth.mu, groups) for mu in runs]
    out: dict[str, Any] = {key: float(np.mean([e[key] for e in each])) for key in each[0]}
    out["average_of_runs_spearman"] = agreement(np.mean(runs, 0), truth.mu, groups)["spearman_per_query"]
    out |= suspicions([-mu.mean(1) for mu in runs], problem)
    out["each_seed"] = each
    out["by_runs"] = by_runs(runs, truth, problem)
    return out


def by_runs(runs: Sequence[Floats], truth: g1.Truth, problem: g1.Problem) -> dict[str, dict[str, float]]:
    """What the mean score of R runs reaches, averaged over all choices of R of the runs."""
    groups, bad = [group.numpy() for group in problem.groups], problem.flipped.numpy()
    out = {}
    for size in range(1, len(runs) + 1):
        means = [np.mean(chosen, 0) for chosen in itertools.combinations(runs, size)]
        spearman = [agreement(mu, truth.mu, groups)["spearman_per_query"] for mu in means]
        found = [auroc(-mu.mean(1), bad) for mu in means]
        out[str(size)] = {"spearman_per_query": float(np.mean(spearman)), "auroc_mislabel": float(np.mean(found))}
    return out


def suspicions(runs: Sequence[Floats], problem: g1.Problem) -> dict[str, float]:
    bad = problem.flipped.numpy()
    return {"auroc_mislabel": float(np.mean([auroc(s, bad) for s in runs])), **over_seeds(runs)}


def side_by_side(kind: str, seeds: int, truth: g1.Truth, problem: g1.Problem, quick: bool = False) -> dict[str, Any]:
    """The default beside its alternatives and baselines."""
    settings = list(ALTERNATIVES.items())[:: 3 if quick else 1]
    plain = [train(kind, seed, problem, None).seconds for seed in range(seeds)]
    out = {}
    for name, setting in track(settings, description=f"{kind}: estimators"):
        runs = [train(kind, seed, problem, setting) for seed in range(seeds)]
        out[name] = judge([r.mu for r in runs], truth, problem)
        if setting.self_query:
            baselines = {n: suspicions([r.suspicion[n] for r in runs], problem) for n in runs[0].suspicion}
    out |= baselines
    return {"study": "estimators", "rows": out, "seconds_without_recorder": float(np.median(plain))}


def own_study(
    kind: str, seeds: int, rows: Tensor, truth: Tensor, problem: g1.Problem, quick: bool = False
) -> dict[str, Any]:
    """Self-influence and losses against the true influence [2, rows] of rows on their own loss, mean over seeds."""
    out, (true, error) = {}, truth.numpy()
    settings = list(OWN.items())[: 1 if quick else None]
    for name, setting in track(settings, description=f"{kind}: self-influence"):
        runs = [train(kind, seed, problem, setting).suspicion for seed in range(seeds)]
        scores = {name: [run[SELF] for run in runs]}
        if name == SELF:
            scores |= {other: [run[other] for run in runs] for other in runs[0] if other != SELF}
        for each, found in scores.items():
            judged = [of_own(s[rows.numpy()], true, problem.flipped[rows].numpy()) for s in found]
            out[each] = {key: float(np.mean([j[key] for j in judged])) for key in judged[0]}
    return {"count": len(rows), "standard_error": float(error.mean()), "rows": out}


def of_own(score: Floats, truth: Floats, bad: NDArray[np.bool_]) -> dict[str, float]:
    """Agreement over rows; the slope has an intercept, for scores of self-influence are differences to the average."""
    return {
        "spearman": float(spearmanr(score, truth)[0]),
        "spearman_flipped": float(spearmanr(score[bad], truth[bad])[0]),
        "spearman_others": float(spearmanr(score[~bad], truth[~bad])[0]),
        "pearson": float(np.corrcoef(score, truth)[0, 1]),
        "slope": float(np.polyfit(score, truth, 1)[0]),
    }


def sweep(kind: str, seeds: int, truth: g1.Truth, problem: g1.Problem, quick: bool = False) -> dict[str, Any]:
    """Refreshing seldom, observing the curvature seldom."""
    refreshes = REFRESHES[2:4] if quick else REFRESHES
    settings = [Setting(r, d, curvature_every=1, method=RUN_ALONE) for d in (True, False) for r in refreshes]
    settings += [Setting(r, curvature_every=4, method=RUN_ALONE) for r in refreshes if r >= 10]
    plain = [train(kind, seed, problem, None).seconds for seed in range(seeds)]
    out = {}
    for setting in track(settings, description=f"{kind}: sweep"):
        runs = [train(kind, seed, problem, setting) for seed in range(seeds)]
        discount = "discount on" if setting.discount else "discount off"
        often = f", curvature every {setting.curvature_every}" if setting.discount else ""
        out[f"refresh every {setting.refresh_every}, {discount}{often}"] = {
            "seconds": float(np.median([r.seconds for r in runs])),
            **judge([r.mu for r in runs], truth, problem),
        }
    return {"study": "sweep", "rows": out, "seconds_without_recorder": float(np.median(plain))}


def main(argv: Sequence[str] | None = None, report: Callable[[str], None] = print) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--family" in arguments:
        from benchmarks import fidelity_family

        arguments.remove("--family")
        fidelity_family.main(arguments)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else scikit-learn's digits")
    parser.add_argument("--truth", help="file that keeps the truth; {optimizer} in its name is replaced")
    parser.add_argument("--runs", type=int, default=512, help="trainings a group for the truth (a quarter a row)")
    parser.add_argument("--seeds", type=int, default=3, help="one-run estimates (5: smoother)")
    parser.add_argument("--optimizers", nargs="+", choices=g1.OPTIMIZERS, default=g1.OPTIMIZERS)
    parser.add_argument("--sweep", action="store_true", help="intervals of refresh and curvature instead")
    parser.add_argument(
        "--quick", action="store_true", help="8 trainings a group, 2 seeds, few settings: to see it work"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are small: more threads are slower
    seeds, runs = (min(args.seeds, 2), min(args.runs, 8)) if args.quick else (args.seeds, args.runs)
    where = folder(args.data)
    problem = g1.load(where)
    results: dict[str, Any] = {
        "protocol": "g1",
        "data": "scikit-learn digits" if where is None else "10,000 MNIST digits",
        "machine": machine(),
        "seeds": seeds,
        "optimizers": {},
    }
    for kind in args.optimizers:
        file = Path(args.truth.format(optimizer=kind)) if args.truth else None
        truth = g1.truth(kind, runs, problem, file)
        found = (sweep if args.sweep else side_by_side)(kind, seeds, truth, problem, args.quick)
        if not args.sweep:
            rows = g1.single_rows(problem)[:: 10 if args.quick else 1]
            own = g1.own_truth(kind, runs // 4, problem, file, rows)
            found["own"] = own_study(kind, seeds, rows, own, problem, args.quick)
        results["optimizers"][kind] = {"truth": truth.reliability(), **found}
        args.json.write_text(json.dumps(results, indent=1))
        for name, row in [*found["rows"].items(), *found.get("own", {"rows": {}})["rows"].items()]:
            report(f"{kind:6s}{name:45s}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float)))


if __name__ == "__main__":
    main()
