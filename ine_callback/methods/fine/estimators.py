"""The estimators as published: the whole step's effect on a query, compared between steps with and without a row.

A step's predicted decrease of the query, less its recent trend ("difference in differences") and in units of its noise,
is binned for every row of the step and for all steps. ``auc`` and ``max_threshold`` read mu off the two histograms
(:mod:`ine_callback.stats.tradeoff`). See :class:`~ine_callback.FINE` for what that costs.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ine_callback.methods.base import host
from ine_callback.scores import Floats
from ine_callback.stats.tradeoff import auc_mu_from_counts, max_threshold_mu_from_counts

BINS = 64
TREND_DECAY = 0.9
CHUNK_ROWS = 4096  # converted at once


def start(rows: int, queries: int, device: torch.device) -> dict[str, Tensor]:
    """Allocates the state: 256 N Q bytes."""
    return {
        "histogram": torch.zeros(rows, queries, BINS, dtype=torch.int32, device=device),
        "all_steps": torch.zeros(queries, BINS, dtype=torch.int32, device=device),
        "trend": torch.zeros(queries, device=device),
    }


def update(state: dict[str, Tensor], rows: Tensor, decrease: Tensor, noise: Tensor, past: int) -> None:
    """Takes a step of ``rows`` [b] with its predicted decrease [Q] and the variance [Q] of it, after ``past`` steps."""
    if past > 0:  # the first step has no trend to be compared with
        q = len(decrease)
        trend = state["trend"] / (1 - TREND_DECAY**past)
        observed = (decrease - trend) * torch.where(noise > 0, noise.rsqrt(), 0.0)
        bins = (torch.special.ndtr(observed) * BINS).to(torch.int64).clamp(0, BINS - 1)
        cell = torch.arange(q, device=bins.device) * BINS + bins
        one = torch.ones_like(cell, dtype=torch.int32)
        state["all_steps"].view(-1).index_add_(0, cell, one)
        cells = (rows[:, None] * (q * BINS) + cell).view(-1)
        state["histogram"].view(-1).index_add_(0, cells, one.expand(rows.shape[0], q).reshape(-1))
    state["trend"].mul_(TREND_DECAY).add_(decrease, alpha=1 - TREND_DECAY)


def compute(state: dict[str, Tensor], estimator: Literal["auc", "max_threshold"]) -> tuple[Floats, Floats]:
    """Returns mu and its standard error [N, Q] on the scale of a sum over steps, NaN where there is none."""
    everything = host(state["all_steps"])
    total, rows = everything.sum(-1), len(state["histogram"])
    estimate = auc_mu_from_counts if estimator == "auc" else max_threshold_mu_from_counts
    mu, se = (np.full((rows, len(everything)), np.nan) for _ in range(2))
    for begin in range(0, rows, CHUNK_ROWS):
        part = slice(begin, begin + CHUNK_ROWS)
        inside = host(state["histogram"][part])
        outside = np.maximum(everything - inside, 0.0)  # negative where a row is twice in a step
        n, n_prime = inside.sum(-1), outside.sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            common = n / np.sqrt(total)
            mu[part] = common * estimate(inside, outside)
            if estimator == "auc":  # Var(AUC) = (1/n + 1/n')/12 at mu = 0, dmu/dAUC = 2 sqrt(pi)
                se[part] = common * np.sqrt(np.where(n_prime > 0, math.pi / 3 * (1 / n + 1 / n_prime), np.nan))
    return mu, se
