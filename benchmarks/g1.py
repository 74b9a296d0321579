"""Protocol G1: the true f-influence of rows, by retraining a small network.

55 groups of rows are left out in turn, 512 times each, for their influence on 200 held-out queries; and 100 single
rows, 128 times each, for their influence on their own loss.

1,000 digits in 50 principal components with 10 % of the labels flipped; MLP 50-32-10; 8 epochs of batches of 50. All
runs with the same rows advance as one network whose parameters have a leading dimension of runs: torch's optimizers
work element by element, so each run is trained as it would be alone.

    mu(S, q) = (mean of phi_q trained without S - mean of phi_q trained on all rows) / pooled sd over the runs

mu > 0: training on S lowers the query (helpful). A training without a single row and the one with it share initial
weights and order, and the row's loss counts as 0: the difference of the means is then known ten times better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from benchmarks.data import digits
from benchmarks.metrics import Floats, per_query_spearman

ROWS, QUERIES, INPUTS, HIDDEN, CLASSES, BATCH, EPOCHS = 1000, 200, 50, 32, 10, 50, 8
STEPS = EPOCHS * (ROWS // BATCH)
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Problem:
    """Rows x [1000, 50] with partly flipped labels y, held-out queries xq, yq, and the 55 groups of rows."""

    x: Tensor
    y: Tensor
    flipped: Tensor
    xq: Tensor
    yq: Tensor
    groups: tuple[Tensor, ...]


@dataclass(frozen=True)
class Truth:
    """True mu [groups, Q] over ``runs`` trainings a side (0: unknown); ``halves`` [2, groups, Q] use half each."""

    mu: Floats
    runs: int
    halves: Floats | None = None

    def reliability(self) -> dict[str, float]:
        """How well the truth can be known: its standard error, and the ranking's reliability (1: no noise).

        The runs on all rows are common to all groups of a query, so their noise does not change a ranking: the part
        that does is 1 / runs. The ceiling of a perfect estimate's correlation is the reliability's square root.
        """
        if not self.runs:
            return {}
        signal = self.mu.var(0, ddof=1)
        out = {
            "runs": float(self.runs),
            "standard_error": math.sqrt(2 / self.runs),
            "reliability": float(np.mean(1 - np.minimum(1, 1 / self.runs / signal))),
        }
        if self.halves is not None:
            half = per_query_spearman(self.halves[0], self.halves[1])
            out["split_half_spearman"] = half
            out["split_half_reliability"] = 2 * half / (1 + half)  # Spearman-Brown
        return out


def load(folder: Path | None) -> Problem:
    """The fixed problem; every random choice is seeded, so that a truth can be kept in a file."""
    images, labels = digits(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = images - images.mean(0)
        _, _, components = torch.pca_lowrank(images, INPUTS, niter=4)
    z = images @ components
    z = z / z.std()
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(z), generator=g)
    held_out = max(ROWS, len(z) // 2)
    rows, queries = order[:ROWS], order[held_out : held_out + QUERIES]
    y = labels[rows].clone()
    flipped = torch.rand(ROWS, generator=g) < 0.1
    y[flipped] = (y[flipped] + torch.randint(1, CLASSES, (int(flipped.sum()),), generator=g)) % CLASSES
    return Problem(z[rows], y, flipped, z[queries], labels[queries], tuple(_groups(y, flipped, g)))


def _groups(y: Tensor, flipped: Tensor, g: torch.Generator) -> Iterable[Tensor]:
    """30 random hundreds, the classes, the flipped rows, 4 x 50 of those, and 50 unflipped rows of each class."""
    bad = torch.where(flipped)[0]
    yield from (torch.randperm(ROWS, generator=g)[:100] for _ in range(30))
    yield from (torch.where(y == c)[0] for c in range(CLASSES))
    yield bad
    yield from (bad[torch.randperm(len(bad), generator=g)[:50]] for _ in range(4))
    yield from (torch.where(~flipped & (y == c))[0][:50] for c in range(CLASSES))


def initial(runs: int, g: torch.Generator) -> list[Tensor]:
    """Weight and bias of both layers, [runs, out, in] and [runs, out]: N(0, 1/fan_in) and zero."""
    first = torch.randn(runs, HIDDEN, INPUTS, generator=g) / math.sqrt(INPUTS)
    second = torch.randn(runs, CLASSES, HIDDEN, generator=g) / math.sqrt(HIDDEN)
    return [first, torch.zeros(runs, HIDDEN), second, torch.zeros(runs, CLASSES)]


def make_optimizer(kind: str, parameters: Iterable[Tensor], steps: int) -> tuple[Optimizer, LRScheduler | None]:
    """The protocol's optimizer and, for AdamW, its cosine schedule to zero."""
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.1), None
    adamw = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    return adamw, CosineAnnealingLR(adamw, steps)


def logits(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs [runs, n, classes] of all runs for x [runs or 1, n, in]."""
    w1, b1, w2, b2 = parameters
    hidden = (x @ w1.mT + b1[:, None]).relu()
    return hidden @ w2.mT + b2[:, None]


def retrain(
    kind: str,
    runs: int,
    keep: Tensor,
    seed: int,
    problem: Problem,
    asked: tuple[Tensor, Tensor] | None = None,
    muted: int | None = None,
) -> Tensor:
    """Query losses [runs, Q] after training ``runs`` networks on the rows ``keep``.

    Args:
        kind: Optimizer.
        runs: Networks.
        keep: Rows to train on.
        seed: Of initial weights and order.
        problem: Rows and queries.
        asked: Other queries (x, y) than the problem's.
        muted: A row whose loss counts as 0; initial weights and order stay those of the training with it.
    """
    xq, yq = asked or (problem.xq, problem.yq)
    g = torch.Generator().manual_seed(seed)
    parameters = [p.requires_grad_() for p in initial(runs, g)]
    optimizer, scheduler = make_optimizer(kind, parameters, EPOCHS * (len(keep) // BATCH))
    for _ in range(EPOCHS):
        order = keep[torch.argsort(torch.rand(runs, len(keep), generator=g), 1)]
        for start in range(0, len(keep) - BATCH + 1, BATCH):
            rows = order[:, start : start + BATCH]
            out = logits(parameters, problem.x[rows])
            losses = F.cross_entropy(out.flatten(0, 1), problem.y[rows].flatten(), reduction="none")
            if muted is not None:
                losses = losses * (rows.flatten() != muted)
            optimizer.zero_grad()
            (losses.sum() / BATCH).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    with torch.no_grad():
        out = logits(parameters, xq[None])
        targets = yq.expand(runs, -1)
        return F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none").view(runs, -1)


def true_mu(base: Tensor, without: Tensor) -> Tensor:
    """Difference of the means over runs, in pooled standard deviations [Q]."""
    return (without.mean(0) - base.mean(0)) / ((base.var(0) + without.var(0)) / 2).sqrt()


def compute_truth(kind: str, runs: int, problem: Problem, which: Sequence[int] | None = None) -> Truth:
    """Retrains without each group (or those of the numbers ``which``) and on all rows: minutes on two cores."""
    base = retrain(kind, runs, torch.arange(ROWS), 0, problem)
    mu, halves = [], []
    which = range(len(problem.groups)) if which is None else which
    for k in track(which, description=f"truth, {kind}, {runs} runs a group"):
        keep = torch.ones(ROWS, dtype=torch.bool)
        keep[problem.groups[k]] = False
        without = retrain(kind, runs, torch.where(keep)[0], 1000 + k, problem)
        mu.append(true_mu(base, without))
        halves.append(torch.stack([true_mu(base[h::2], without[h::2]) for h in (0, 1)]))
    return Truth(torch.stack(mu).double().numpy(), runs, torch.stack(halves, 1).double().numpy())


def single_rows(problem: Problem) -> Tensor:
    """The 100 rows left out alone: 40 flipped ones, then 60 others."""
    bad, good = torch.where(problem.flipped)[0], torch.where(~problem.flipped)[0]
    return torch.cat([bad[:40], good[:60]])


def own_truth(kind: str, runs: int, problem: Problem, file: Path | None, rows: Tensor) -> Tensor:
    """Influence of rows on their own loss, and its standard error, [2, rows]; kept beside ``file`` if given.

    Raises:
        SystemExit: If the file holds a truth of another shape.
    """
    file = None if file is None else file.with_name(f"{file.stem}-own{file.suffix}")
    if file is not None and file.is_file():
        kept: Tensor = torch.load(file)
        if kept.shape != (2, len(rows)):
            raise SystemExit(f"{file} holds a truth of shape {tuple(kept.shape)}, not {(2, len(rows))}")
        return kept
    everything, asked = torch.arange(ROWS), (problem.x[rows], problem.y[rows])
    base, found = retrain(kind, runs, everything, 77, problem, asked), []
    for k, row in enumerate(track(rows.tolist(), description=f"truth, {kind}, {runs} runs without single rows")):
        own, without = (
            base[:, k],
            retrain(kind, runs, everything, 77, problem, (asked[0][k:][:1], asked[1][k:][:1]), row),
        )
        sd = ((own.var() + without.var()) / 2).sqrt()
        change = (without[:, 0] - own) / sd
        found.append(torch.stack([change.mean(), change.std() / math.sqrt(runs)]))
    both = torch.stack(found, 1).double()
    if file is not None:
        torch.save(both, file)
    return both


def truth(kind: str, runs: int, problem: Problem, file: Path | None) -> Truth:
    """The truth from ``file`` if it is there, else computed and, with a ``file``, kept there.

    Raises:
        SystemExit: If the file holds a truth of another shape.
    """
    shape = (len(problem.groups), len(problem.yq))
    if file is None or not file.is_file():
        found = compute_truth(kind, runs, problem)
        if file is not None:
            halves = None if found.halves is None else torch.tensor(found.halves)
            torch.save({"mu": torch.tensor(found.mu), "runs": runs, "halves": halves}, file)
        return found
    kept = torch.load(file)
    if isinstance(kept, Tensor):  # mu alone
        kept = {"mu": kept, "runs": 0, "halves": None}
    if tuple(kept["mu"].shape) != shape:
        raise SystemExit(f"{file} holds a truth of shape {tuple(kept['mu'].shape)}, not {shape}; name another --truth")
    halves = kept["halves"]
    return Truth(kept["mu"].double().numpy(), kept["runs"], None if halves is None else halves.double().numpy())
