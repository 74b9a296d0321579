"""Weak groups against retraining: does training without such a group move the query as the report says?

A perceptron on scikit-learn's digits, a tenth of the labels wrong, as in examples/ask_later.py. One recorded training
with a store and the validation loss as the query gives weak groups. Then trainings without each of them, without as
many random groups of the same sizes, and without the other groups of the same k-means, each paired with one on all rows
of the same seed: it has the same initial weights and order, rows of the group count 0 in the loss and the others so
much more that the step's size stays. These seeds are others than the recorded training's.

    mu(S) = mean over pairs of (loss without S - loss with it) / sd of the loss over seeds

mu > 0: training on S lowers the query (helpful), as the sum of the rows' scores says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy import stats
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.data import digits
from benchmarks.lds import retrain
from benchmarks.lds.problems import Problem
from benchmarks.metrics import Floats
from benchmarks.network import cross_entropy
from benchmarks.recorded import recorded_step
from ine_callback import GradientStore, InfluenceReport, Recorder
from ine_callback.report.weak_groups import ALONE, FEWEST, grouped

ROWS, WRONG, BATCH, EPOCHS = 1000, 0.1, 50, 10
PAIRS, FIRST = 64, 7000  # trainings with and without each group, and the first one's seed
SEED = 1  # of the recorded training
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "SGD": partial(SGD, lr=0.1),
    "AdamW": partial(AdamW, lr=1e-3),
}
KINDS = ("weak", "other", "random")

Rows = NDArray[np.int64]


def all_of(quick: bool) -> dict[str, dict[str, Any]]:
    """What was found with each optimizer."""
    names = list(OPTIMIZERS)[:1] if quick else OPTIMIZERS
    return {f"perceptron, {name}": compared(name, 4 if quick else PAIRS) for name in names}


def problem_of(optimizer: str) -> Problem:
    """Digits, as the example has them."""
    x, y = digits(None)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=g)
    x, y = x[order], y[order].clone()
    wrong = torch.rand(ROWS, generator=g) < WRONG
    y[:ROWS] = torch.where(wrong, (y[:ROWS] + torch.randint(1, 10, (ROWS,), generator=g)) % 10, y[:ROWS])
    return Problem(
        *("weak", "perceptron 64-32-10 on digits", x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]),
        subsets=torch.zeros(0, 0),
        network=lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        optimizer=OPTIMIZERS[optimizer],
        lr=0.0,
        batch=BATCH,
        epochs=EPOCHS,
        hessian_rows=0,
    )


def compared(optimizer: str, pairs: int) -> dict[str, Any]:
    """Each kind's groups: what the report says of them, and what retraining does."""
    problem = problem_of(optimizer)
    report = recorded(problem)
    groups = groups_of(report)
    every = [group for kind in KINDS for group in groups[kind]]
    kinds = np.repeat(KINDS, [len(groups[kind]) for kind in KINDS])
    said = np.array([report.scores.mu[group, 0].sum() for group in every])
    losses = retrained(problem, every, pairs)
    change = losses[:, :-1] - losses[:, -1:]
    sd = float(losses[:, -1].std(ddof=1))
    mu, p = change.mean(0) / sd, stats.ttest_1samp(change, 0.0).pvalue
    found: dict[str, Any] = {"pairs": pairs, "loss": float(losses[:, -1].mean()), "sd": sd}
    sizes = np.array([len(group) for group in every])
    for kind in (*KINDS, "all"):
        which = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        if which.sum() > 2:
            found[kind] = summary(said[which], mu[which], p[which], sizes[which])
            found[kind]["beyond random"] = beyond(mu[which], mu[kinds == "random"])
    columns = {"kind": kinds, "rows": sizes, "said": said, "mu": mu, "se": change.std(0) / sd / pairs**0.5, "p": p}
    found["groups"] = {name: column.tolist() for name, column in columns.items()}
    return found


def summary(said: Floats, mu: Floats, p: Floats, sizes: Rows) -> dict[str, float]:
    """How the sums of scores agree with retraining, over groups."""
    moved = p < 0.05
    same = np.sign(said) == np.sign(mu)
    return {
        "groups": len(said),
        "rows": float(np.mean(sizes)),
        "lower": int((said > 0).sum()),
        "sign": float(same.mean()),
        "moved": int(moved.sum()),
        "moved as said": int((moved & same).sum()),
        "spearman": float(stats.spearmanr(said, mu)[0]),
        "said size": float(np.median(np.abs(said))),
        "size": float(np.median(np.abs(mu))),
        "slope": float((said * mu).sum() / np.square(said).sum()),
    }


def beyond(mu: Floats, random: Floats) -> int:
    """How many groups move the query further than any random group does."""
    return int((np.abs(mu) > np.abs(random).max(initial=0.0)).sum())


def recorded(problem: Problem) -> InfluenceReport:
    """The report of one training with a store."""
    torch.manual_seed(SEED)
    model = problem.network()
    optimizer, steps = problem.optimizer(model.parameters()), problem.epochs * problem.steps_per_epoch
    recorder = Recorder(
        *(model, optimizer, len(problem.x), {"val": (problem.xq, problem.yq)}, cross_entropy),
        total_steps=steps,
        store=GradientStore(),
        on_error="raise",
    )
    with recorder:
        for _ in range(problem.epochs):
            for rows in torch.randperm(len(problem.x)).split(problem.batch):
                recorded_step(recorder, model, optimizer, cross_entropy, rows, (problem.x[rows], problem.y[rows]))
    return recorder.report()


def groups_of(report: InfluenceReport) -> dict[str, list[Rows]]:
    """Weak groups; the others of the same k-means; and random ones as large as the weak ones."""
    assert report.store is not None
    scores, weak = report.scores, [one.rows for one in report.weak_groups()]
    rows = np.flatnonzero(report.store.seen)
    alone = scores.q[rows, 0] > ALONE
    numbers = grouped(report.store, rows, scores.mu[rows][:, :1])
    made = [rows[alone & (numbers == k)] for k in range(int(numbers.max()) + 1)]
    known = {tuple(group.tolist()) for group in weak}
    others = [group for group in made if len(group) >= FEWEST and tuple(group.tolist()) not in known]
    g = np.random.default_rng(SEED)
    drawn = [g.choice(rows[alone], len(group), replace=False) for group in weak]
    return {"weak": weak, "other": others, "random": drawn}


def retrained(problem: Problem, groups: list[Rows], pairs: int) -> Floats:
    """The query's loss [pairs, groups + 1] of trainings without each group, and at the end of those on all rows."""
    n = len(problem.x)
    weight = torch.ones(len(groups) + 1, n)
    for one, group in zip(weight, groups, strict=False):
        one[torch.as_tensor(group)] = 0.0
        one *= n / (n - len(group))
    keep, found = torch.arange(n).expand(len(weight), -1), []
    for seed in track(range(pairs), description=f"{len(groups)} groups left out"):
        states = retrain.train(problem, keep, FIRST + seed, weight)
        found.append(retrain.outcomes(problem, retrain.last(states))[0].mean(1))
    losses: Floats = torch.stack(found).numpy()
    return losses
