"""How stable one run's scores are: over seeds, batch size, learning rate, optimizer and schedule.

    python -m benchmarks.randomness --json randomness.json --data DIR

Protocol G1's rows (1,000 digits, 10 % of the labels flipped, MLP 50-32-10, 8 epochs), recorded with the package's
defaults; queries are the mean held-out loss, the mean held-out margin, and every row's own loss. One setting of the
training is changed at a time. Within a setting: one run against the mean of the other runs (the multi-run score) and
against one other run. Across settings: mean scores against those of the base. Suspicious rows are those with the lowest
score, on their own loss those with the highest.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from scipy.stats import spearmanr
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks import g1
from benchmarks.data import folder
from benchmarks.metrics import Floats, jaccard, mean_and_half_width
from benchmarks.network import cross_entropy, machine, network
from ine_callback import Query, Recorder
from ine_callback.scores import Scores

QUERIES = ("loss", "margin", "self")
Z95 = 1.96


@dataclass(frozen=True)
class Setting:
    """How the network is trained."""

    lr: float = 0.1
    batch: int = 50
    optimizer: Literal["sgd", "momentum", "adamw"] = "sgd"
    cosine: bool = False


SETTINGS = {
    "base: SGD .1, batches of 50": Setting(),
    "batches of 25": Setting(batch=25),
    "batches of 100": Setting(batch=100),
    "learning rate .05": Setting(lr=0.05),
    "learning rate .2": Setting(lr=0.2),
    "cosine schedule": Setting(cosine=True),
    "momentum .9, learning rate .01": Setting(lr=0.01, optimizer="momentum"),
    "AdamW 3e-3, cosine": Setting(lr=3e-3, optimizer="adamw", cosine=True),
}
BASE = next(iter(SETTINGS))


def one_run(seed: int, setting: Setting, problem: g1.Problem) -> Scores:
    """The scores of one recorded training."""
    g = torch.Generator().manual_seed(seed)
    model = network(g)
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), setting.lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), setting.lr, 0.9 if setting.optimizer == "momentum" else 0.0)
    steps = g1.EPOCHS * (g1.ROWS // setting.batch)
    scheduler = CosineAnnealingLR(optimizer, steps) if setting.cosine else None
    held_out = (problem.xq, problem.yq)
    recorder = Recorder(
        *(model, optimizer, g1.ROWS),
        {"loss": held_out, "margin": Query.margin(held_out), "self": "self"},
        cross_entropy,
        total_steps=steps,
        schedulers=[(scheduler, 1)] if scheduler else [],
        on_error="raise",
    )
    with recorder:
        for _ in range(g1.EPOCHS):
            for rows in torch.randperm(g1.ROWS, generator=g).split(setting.batch):
                batch = (problem.x[rows], problem.y[rows])
                with recorder.batch(rows, batch):
                    cross_entropy(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                if scheduler:
                    scheduler.step()
    return recorder.report().scores


def alike(one: Floats, two: Floats, sign: float) -> dict[str, float]:
    """Agreement of two columns of scores [N]; ``sign`` times the score is a row's suspicion."""
    return {
        "spearman": float(spearmanr(one, two)[0]),
        "jaccard_10": jaccard(sign * one, sign * two, 0.1),
        "jaccard_20": jaccard(sign * one, sign * two, 0.2),
        "same_sign": float((np.sign(one) == np.sign(two)).mean()),
    }


def within(runs: Sequence[Scores], column: int, sign: float) -> dict[str, list[float]]:
    """One value for each run: against the mean of the others, and against the next run."""
    mu = np.stack([run.mu[:, column] for run in runs])
    out: dict[str, list[float]] = {}
    for k, run in enumerate(runs):
        others, following = np.delete(mu, k, 0).mean(0), mu[(k + 1) % len(mu)]
        flagged = run.q[:, column] <= 0.05
        found = {f"{name}_mean_of_others": value for name, value in alike(mu[k], others, sign).items()}
        found |= alike(mu[k], following, sign)
        same = np.sign(mu[k]) == np.sign(following)
        found["same_sign_flagged"] = float(same[flagged].mean()) if flagged.any() else float("nan")
        found["coverage"] = float((np.abs(mu[k] - others) <= Z95 * run.se[:, column]).mean())
        found["slope"] = float((mu[k] * others).sum() / (mu[k] ** 2).sum())
        for name, value in found.items():
            out.setdefault(name, []).append(value)
    return out


def study(runs: dict[str, list[Scores]]) -> dict[str, Any]:
    """All measures of every setting and query, [mean, half width of its 95 % interval over runs]."""
    out: dict[str, Any] = {}
    for (name, found), (column, query) in itertools.product(runs.items(), enumerate(QUERIES)):
        sign = 1.0 if query == "self" else -1.0
        row: dict[str, Any] = {key: mean_and_half_width(v) for key, v in within(found, column, sign).items()}
        means = [np.mean([run.mu[:, column] for run in some], 0) for some in (found, runs[BASE])]
        row["to_base"] = alike(means[0], means[1], sign)
        singles = [alike(a.mu[:, column], b.mu[:, column], sign) for a, b in zip(found, runs[BASE][::-1], strict=True)]
        row["to_base_one_run"] = {key: float(np.mean([s[key] for s in singles])) for key in singles[0]}
        out.setdefault(name, {})[query] = row
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else scikit-learn's digits")
    parser.add_argument("--seeds", type=int, default=12, help="runs of each setting (even, at least 2)")
    parser.add_argument("--quick", action="store_true", help="2 runs of 2 settings: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = folder(args.data)
    problem = g1.load(where)
    seeds, settings = (2, dict(list(SETTINGS.items())[:2])) if args.quick else (args.seeds, SETTINGS)
    runs = {
        name: [one_run(seed, setting, problem) for seed in track(range(seeds), description=name)]
        for name, setting in settings.items()
    }
    data = "scikit-learn digits" if where is None else "10,000 MNIST digits"
    found = study(runs)
    results = {"protocol": "randomness", "data": data, "machine": machine(), "seeds": seeds, "settings": found}
    args.json.write_text(json.dumps(results, indent=1))
    for name, queries in found.items():
        for query, row in queries.items():
            numbers = "  ".join(f"{key} {value[0]:.3f}" for key, value in row.items() if isinstance(value, tuple))
            print(f"{name:32s}{query:8s}{numbers}  to base {row['to_base']['spearman']:.3f}")


if __name__ == "__main__":
    main()
