"""Steps whose signals know nothing of their rows, and the scores that f-INE makes of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import QueryInfo, Scores

CPU = torch.device("cpu")
Step = tuple[Tensor, Tensor, float]


def infos(count: int) -> tuple[QueryInfo, ...]:
    return tuple(QueryInfo(f"q{k}", "loss", "Does training on the row lower the loss?") for k in range(count))


def steps(rows: int, batch: int, count: int, queries: int = 2, seed: int = 0, heavy: bool = False) -> Iterator[Step]:
    """A null run: signals know nothing of their row; shifts grow 50-fold, rows are drawn with unequal chances."""
    g = np.random.default_rng(seed)
    chances = g.gamma(1.5, size=rows)
    for t in range(count):
        drawn = g.choice(rows, batch, replace=False, p=chances / chances.sum())
        noise = g.standard_t(3, size=(batch, queries)) if heavy else g.normal(size=(batch, queries))
        yield torch.tensor(drawn), torch.tensor(noise * math.exp(4 * t / count) + 1.0), 0.1


def scores(fine: FINE, run: Iterator[Step], rows: int, queries: int = 2) -> Scores:
    fine.start(rows, infos(queries), CPU)
    for step in run:
        fine.update(*step)
    return fine.compute()
