"""Do scores foretell training on half of the rows? Linear data-modelling score (LDS) on digits.

600 rows, a network 64-24-10, SGD with momentum. 50 random halves, 4 trainings each, all at once: as one network whose
parameters have a leading dimension of trainings. The measurement is the margin of 40 held-out rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from benchmarks.influence.shared import (
    context_of,
    mean_and_error,
    network,
    scored,
    shuffled_digits,
)
from benchmarks.metrics import Floats, per_query, per_query_spearman
from benchmarks.network import cross_entropy
from ine_callback import IF, Recorder
from ine_callback.methods.context import FitContext
from ine_callback.queries import MarginQuery, Query, margins

BATCH, RATE, MOMENTUM, DECAY = 50, 0.03, 0.9, 1e-3
SPREAD = (1 / 8, 1 / 5)  # of the initial weights
SOLVERS = ("identity", "kfac", "ekfac", "astra", "exact", "pcg")
DAMPINGS: tuple[float | str, ...] = (3e-4, 3e-3, 1e-2, "run", "auto")
DIFFERENCES = (("astra", "ekfac"), ("ekfac", "identity"), ("exact", "ekfac"), ("astra", "exact"))


@dataclass(frozen=True)
class Problem:
    """Rows x, y; held-out rows xq, yq; how wide a network, how long and how often to train."""

    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor
    hidden: int
    epochs: int
    subsets: int
    trainings: int


def problem(quick: bool) -> Problem:
    x, y = shuffled_digits(0)
    rows, queries = (200, 8) if quick else (600, 40)
    sizes = (8, 5, 12, 2) if quick else (24, 40, 50, 4)
    x = x.float()
    return Problem(x[:rows], y[:rows], x[1000 : 1000 + queries], y[1000 : 1000 + queries], *sizes)


def halves(p: Problem) -> Tensor:
    """Which rows are kept [subsets, N]."""
    generator = torch.Generator().manual_seed(5)
    orders = torch.rand(p.subsets, len(p.y), generator=generator).argsort(1)
    return orders < len(p.y) // 2


def retrained(p: Problem, kept: Tensor, seed: int) -> Tensor:
    """Margins [subsets, Q] of networks trained on the kept rows, from initial weights of their own."""
    models = [network(p.hidden, 1000 * seed + k, SPREAD).float() for k in range(len(kept))]
    stacked = [
        torch.stack(same).detach().requires_grad_() for same in zip(*(m.parameters() for m in models), strict=True)
    ]
    w1, b1, w2, b2 = stacked
    optimizer = torch.optim.SGD(stacked, RATE, MOMENTUM, weight_decay=DECAY)
    rows = torch.stack([mask.nonzero()[:, 0] for mask in kept])
    generator = torch.Generator().manual_seed(seed)

    def logits(inputs: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ w1.mT + b1[:, None])
        return hidden @ w2.mT + b2[:, None]

    for _ in track(range(p.epochs), description=f"halves, training {seed}"):
        order = rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(1))
        for batch in order.split(BATCH, 1):
            optimizer.zero_grad()
            losses = F.cross_entropy(logits(p.x[batch]).flatten(0, 1), p.y[batch].flatten(), reduction="none")
            losses.view(batch.shape).mean(1).sum().backward()
            optimizer.step()
    with torch.no_grad():
        found = logits(p.xq.expand(len(kept), -1, -1)).flatten(0, 1)
        return margins(found, p.yq.repeat(len(kept))).view(len(kept), -1)


def recorded(p: Problem, seed: int) -> tuple[FitContext, Floats]:
    """A network trained on all rows, as IF gets it, and f-INE's scores [N, Q] of that training."""
    module = network(p.hidden, 10**6 + seed, SPREAD).float()
    optimizer = torch.optim.SGD(module.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    steps = p.epochs * (len(p.y) // BATCH)
    queries: dict[str, Query] = {"margin": MarginQuery((p.xq, p.yq), per_row=True)}
    recorder = Recorder(module, optimizer, len(p.y), queries, cross_entropy, total_steps=steps, on_error="raise")
    generator = torch.Generator().manual_seed(seed)
    with recorder:
        for _ in track(range(p.epochs), description=f"recorded, seed {seed}"):
            for rows in torch.randperm(len(p.y), generator=generator).split(BATCH):
                batch = (p.x[rows], p.y[rows])
                with recorder.batch(rows, batch):
                    cross_entropy(module, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    context = context_of(module, cross_entropy, (p.x, p.y), queries, (optimizer, RATE * steps))
    return context, recorder.report().scores.mu


def difference(one: list[Floats], other: list[Floats], kept: Floats, truth: Floats, resamples: int) -> dict[str, float]:
    """Mean over models of the LDS less another one, with its 95 % interval over resampled halves."""
    rng = np.random.default_rng(0)

    def less(which: Any) -> float:
        pairs = zip(one, other, strict=True)
        means = [
            np.nanmean(per_query(kept[which] @ a, truth[which]) - per_query(kept[which] @ b, truth[which]))
            for a, b in pairs
        ]
        return float(np.mean(means))

    drawn = [less(rng.integers(len(kept), size=len(kept))) for _ in range(resamples)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"difference": less(slice(None)), "low": float(low), "high": float(high)}


def measured(quick: bool) -> dict[str, Any]:
    """LDS of each solver and damping, of f-INE, and differences."""
    p, models, resamples = (problem(quick), 2, 20) if quick else (problem(quick), 3, 400)
    dampings = DAMPINGS[3:] if quick else DAMPINGS
    kept = halves(p)
    each = np.stack([retrained(p, kept, seed).double().numpy() for seed in range(p.trainings)])
    truth, chosen = each.mean(0), kept.double().numpy()
    fits = [recorded(p, seed) for seed in range(models)]
    scores: dict[str, dict[str, list[Floats]]] = {}
    used: dict[str, float] = {}
    with torch.no_grad():
        accuracy = [float((c.module(p.xq).argmax(1) == p.yq).double().mean()) for c, _ in fits]
    for solver in track(SOLVERS, description="solvers"):
        for damping in dampings[:1] if solver == "identity" else dampings:
            name = "" if solver == "identity" else str(damping)
            method = IF(solver, damping=damping, batch_size=min(256, len(p.y)), iterations=20 if quick else 200)  # type: ignore[arg-type]
            found = [scored(context, method) for context, _ in fits]
            scores.setdefault(solver, {})[name] = [one.scores for one in found]
            if solver == "ekfac":
                used[name] = float(np.mean([one.arrays["damping"].mean() for one in found]))
    scores["f-INE"] = {"": [mu for _, mu in fits]}
    lds = {
        solver: {
            name: mean_and_error([per_query_spearman(chosen @ one, truth) for one in found])
            for name, found in by_damping.items()
        }
        for solver, by_damping in scores.items()
    }
    together = {
        solver: {name: per_query_spearman(chosen @ np.mean(found, 0), truth) for name, found in by_damping.items()}
        for solver, by_damping in scores.items()
    }
    differences = {
        f"{one} less {other}": {
            str(d): difference(of(scores, one, d), of(scores, other, d), chosen, truth, resamples) for d in dampings
        }
        for one, other in DIFFERENCES
    }
    halves_agree = per_query_spearman(each[: p.trainings // 2].mean(0), each[p.trainings // 2 :].mean(0))
    return {
        "rows": len(p.y),
        "queries": len(p.yq),
        "subsets": p.subsets,
        "trainings": p.trainings,
        "epochs": p.epochs,
        "models": models,
        "accuracy": accuracy,
        "truth halves agree": halves_agree,
        "damping used": used,
        "lds": lds,
        "mean of models": together,
        "differences": differences,
    }


def of(scores: dict[str, dict[str, list[Floats]]], solver: str, damping: float | str) -> list[Floats]:
    """A solver's scores at a damping, which gradient dot products do without."""
    by_damping = scores[solver]
    return by_damping.get(str(damping)) or by_damping[""]
