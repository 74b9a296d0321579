"""The gap query of f-INE against retraining without groups of rows."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fairness.planted import QUIET, Rows, problem
from ine_callback import FINE, FairSubspaces, InfluenceCallback, Query

ROWS, BATCH, EPOCHS, RATE, HIDDEN = 600, 50, 8, 0.1, 32
Floats = NDArray[np.float64]


class Net(L.LightningModule):
    """The network that is retrained: weights N(0, 1/fan_in), biases 0, SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 2)
        with torch.no_grad():
            for layer in (self.hidden, self.head):
                layer.weight.normal_(0, 1 / math.sqrt(layer.in_features))
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(x).relu())
        return out

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def data() -> tuple[Rows, Rows, list[Tensor]]:
    """Training rows, held-out rows, and 40 groups of training rows: of a class and group, and random ones."""
    train, held_out, _ = problem("digit", 0)
    train, digit = Rows(train.x[:ROWS], (train.y[:ROWS] >= 5).long(), train.z[:ROWS]), train.y[:ROWS]
    cells = [torch.where((digit == d) & (train.z == z))[0][:25] for d in range(10) for z in (0, 1)]
    g = torch.Generator().manual_seed(5)
    groups = [*cells, *(torch.randperm(ROWS, generator=g)[:60] for _ in range(20))]
    return train, Rows(held_out.x, (held_out.y >= 5).long(), held_out.z), groups


def retrained(train: Rows, held_out: Rows, keep: Tensor, runs: int, seed: int) -> Tensor:
    """The gap [runs] on held-out rows after training on the rows ``keep``; all runs as one network."""
    g = torch.Generator().manual_seed(seed)
    w1 = (torch.randn(runs, HIDDEN, 64, generator=g) / 8).requires_grad_()
    w2 = (torch.randn(runs, 2, HIDDEN, generator=g) / math.sqrt(HIDDEN)).requires_grad_()
    b1, b2 = torch.zeros(runs, HIDDEN, requires_grad=True), torch.zeros(runs, 2, requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return (x @ w1.mT + b1[:, None]).relu() @ w2.mT + b2[:, None]

    optimizer = torch.optim.SGD([w1, b1, w2, b2], lr=RATE)
    for _ in range(EPOCHS):
        order = keep[torch.argsort(torch.rand(runs, len(keep), generator=g), 1)]
        for start in range(0, len(keep) - BATCH + 1, BATCH):
            rows = order[:, start : start + BATCH]
            loss = F.cross_entropy(logits(train.x[rows]).flatten(0, 1), train.y[rows].flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / BATCH).backward()
            optimizer.step()
    with torch.no_grad():
        score = logits(held_out.x[None]).softmax(2)[:, :, 1]
    return score[:, held_out.z == 1].mean(1) - score[:, held_out.z == 0].mean(1)


def truth(runs: int) -> tuple[Floats, Floats]:
    """True μ of each group on the gap, in pooled standard deviations, and the same by half of the runs [2, groups]."""
    train, held_out, groups = data()
    base = retrained(train, held_out, torch.arange(ROWS), runs, 0)
    mu, halves = [], []
    for k, group in enumerate(track(groups, description=f"gap: {runs} retrainings a group")):
        keep = torch.ones(ROWS, dtype=torch.bool)
        keep[group] = False
        without = retrained(train, held_out, torch.where(keep)[0], runs, 1000 + k)
        pairs = [(base, without), (base[::2], without[::2]), (base[1::2], without[1::2])]
        each = [float((b.mean() - a.mean()) / ((a.var() + b.var()) / 2).sqrt()) for a, b in pairs]
        mu.append(each[0])
        halves.append(each[1:])
    return np.array(mu), np.array(halves).T


def recorded(seed: int) -> dict[str, Floats]:
    """Group sums of scores of one recorded training [groups]."""
    train, held_out, groups = data()
    asked: dict[str, Any] = {"gap": Query.gap(2), "loss": "val"}
    influence = InfluenceCallback(asked, [FINE(), FairSubspaces(sensitive=2, permutations=19)], on_error="raise")
    L.seed_everything(seed, verbose=False)
    loaders = (
        DataLoader(TensorDataset(rows.x, rows.y, rows.z), BATCH, shuffle=rows is train) for rows in (train, held_out)
    )
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[influence], enable_model_summary=False, **QUIET)
    trainer.fit(Net(), next(loaders), next(loaders))
    report = influence.report
    assert report is not None
    fair = report.attribution("fair")
    assert fair is not None
    scores = {"gap query (μ)": report.scores.mu[:, 0], "loss query (μ)": report.scores.mu[:, 1]}
    scores["fair/gap, linear head"] = fair.scores[:, 0]
    return {name: np.array([each[group.numpy()].sum() for group in groups]) for name, each in scores.items()}


def compared(seeds: int, runs: int) -> dict[str, Any]:
    """Spearman and slope of group sums against the truth: each recorded run's, and that of their mean."""
    mu, halves = truth(runs)
    each = [recorded(seed) for seed in track(range(seeds), description="gap: recorded trainings")]
    found: dict[str, Any] = {"halves": float(spearmanr(*halves)[0]), "runs": runs, "groups": len(mu)}
    for name in each[0]:
        single = [float(spearmanr(one[name], mu)[0]) for one in each]
        mean = np.mean([one[name] for one in each], 0)
        found[name] = {"each_seed": single, "mean of runs": float(spearmanr(mean, mu)[0])}
        found[name]["slope"] = float(mean @ mu / (mean @ mean))
    return found
