"""BIF against retraining (protocol G1), plain and with reduced noise, by the number of draws.

    python -m benchmarks.bif --json bif.json --data DIR --truth truth-sgd.pt

Chains around one trained network of protocol G1 (benchmarks/g1.py), 8 of them, n_beta = γ = 100; all 1,000 rows and 200
queries. Plain is SGLD as published with the settings of docs/methods/bif.md; reduced are the package's defaults. Group
sums of the scores are compared with the true influence of 55 groups, per query. CPU seconds count the whole call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import g1
from benchmarks.data import folder
from benchmarks.metrics import Floats, auroc, per_query_spearman
from benchmarks.network import machine, network
from ine_callback.methods.bif.bif import BIF
from ine_callback.methods.bif.evaluation import EachRow
from ine_callback.methods.bif.run import bif_scores
from ine_callback.methods.bif.scores import BIFScores

DRAWS = (50, 100, 200, 400, 800)
PLAIN_DRAWS = (*DRAWS, 1200, 2400)
COMMON: dict[str, Any] = {"chains": 8, "n_beta": 100.0, "localization": 100.0, "eval_rows": 1000}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain SGLD": {"preconditioner": "none", "reduced": False, "step_size": 1e-3, "thinning": 5},
    "plain SGLD in curvature's coordinates": {"reduced": False},
    "reduced, without curvature's coordinates": {"preconditioner": "none", "thinning": 5},
    "reduced (default)": {},
}


def row_entropies(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def trained(seed: int, problem: g1.Problem) -> nn.Module:
    """The protocol's network after its 160 steps of SGD."""
    g = torch.Generator().manual_seed(seed)
    model = network(g)
    optimizer, _ = g1.make_optimizer("sgd", model.parameters(), g1.STEPS)
    for _ in range(g1.EPOCHS):
        for rows in torch.randperm(g1.ROWS, generator=g).split(g1.BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(problem.x[rows]), problem.y[rows]).backward()
            optimizer.step()
    return model


def judge(scores: Floats, truth: g1.Truth, problem: g1.Problem) -> float:
    """Per-query Spearman of group sums."""
    return per_query_spearman(np.stack([scores[group.numpy()].sum(0) for group in problem.groups]), truth.mu)


def measure(found: BIFScores, seconds: float, truth: g1.Truth, problem: g1.Problem) -> dict[str, float]:
    """Agreement with the truth of a run's estimators, and what the run says about itself."""
    return {
        "spearman_per_query": judge(found.scores, truth, problem),
        "shrunk": judge(found.shrunk, truth, problem),
        "laplace": judge(found.laplace, truth, problem),
        "auroc_flipped": auroc(-found.scores.mean(1), problem.flipped.numpy()),
        "se": float(np.median(found.se)) if found.se is not None else float("nan"),
        "failed_checks": float(len(found.reasons)),
        "step_size": float(found.settings["step_size"]),
        "seconds": seconds,
    }


def study(name: str, draws: Sequence[int], seeds: int, truth: g1.Truth, problem: g1.Problem) -> dict[str, Any]:
    """One variant: mean over seeds for each number of draws (each a run of its own), and CPU milliseconds a draw."""
    out: dict[str, Any] = {}
    for count in draws:
        runs = []
        for seed in range(seeds):
            model, started = trained(seed, problem), time.process_time()
            bif = BIF(draws=count, seed=seed, **(COMMON | VARIANTS[name]))
            queries = {"row": EachRow((problem.xq, problem.yq))}
            found = bif_scores(model, (problem.x, problem.y), queries, bif, row_entropies, progress=False)
            runs.append(measure(found, time.process_time() - started, truth, problem))
        out[str(count)] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        print(f"{name:42s}{count:6d}  " + "  ".join(f"{key} {value:.3g}" for key, value in out[str(count)].items()))
    first, last = str(draws[0]), str(draws[-1])
    out["milliseconds_a_draw"] = 1e3 * (out[last]["seconds"] - out[first]["seconds"]) / (draws[-1] - draws[0])
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else scikit-learn's digits")
    parser.add_argument("--truth", type=Path, help="file that keeps the truth of benchmarks.fidelity under SGD")
    parser.add_argument("--runs", type=int, default=512, help="trainings a group for the truth")
    parser.add_argument("--seeds", type=int, default=2, help="trained networks")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="4 trainings a group, 1 seed, few draws: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the matrices are small: more threads are slower
    where = folder(args.data)
    problem = g1.load(where)
    if args.quick:
        problem = replace(problem, groups=problem.groups[::8])
    truth = g1.truth("sgd", 4 if args.quick else args.runs, problem, args.truth)
    results: dict[str, Any] = {
        "protocol": "bif",
        "data": "scikit-learn digits" if where is None else "10,000 MNIST digits",
        "machine": machine(),
        "truth": truth.reliability(),
        "variants": {},
    }
    for name in args.variants:
        draws = (5, 10) if args.quick else PLAIN_DRAWS if name == "plain SGLD" else DRAWS
        results["variants"][name] = study(name, draws, 1 if args.quick else args.seeds, truth, problem)
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
