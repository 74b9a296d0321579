"""Agreement of one-run scores with the truth and with each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.stats import rankdata, spearmanr

Floats = NDArray[np.float64]


def per_query_spearman(estimate: Floats, truth: Floats) -> float:
    """Spearman over groups, [groups, Q] against [groups, Q], averaged over the queries in which both vary."""
    return float(np.nanmean(per_query(estimate, truth)))


def per_query(estimate: Floats, truth: Floats) -> Floats:
    """Spearman over groups for every query [Q]; NaN where either is constant."""
    a, b = rankdata(estimate, axis=0), rankdata(truth, axis=0)
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore"):
        out: Floats = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return out


def agreement(mu: Floats, truth: Floats, groups: Sequence[NDArray[np.int64]]) -> dict[str, float]:
    """Group sums of the scores mu [N, Q] against the true mu [groups, Q].

    ``slope`` is the regression through the origin of the truth on the estimate: below 1, estimates are too large.
    """
    estimate = np.stack([mu[group].sum(0) for group in groups])
    return {
        "spearman_per_query": per_query_spearman(estimate, truth),
        "pearson": float(np.corrcoef(estimate.ravel(), truth.ravel())[0, 1]),
        "slope": float((estimate * truth).sum() / (estimate**2).sum()),
    }


def auroc(suspicion: Floats, bad: NDArray[np.bool_]) -> float:
    """Probability that a bad row is more suspicious than a good one."""
    n_bad = int(bad.sum())
    ranks = rankdata(suspicion)[bad].sum() - n_bad * (n_bad + 1) / 2
    return float(ranks / (n_bad * (len(bad) - n_bad)))


def over_seeds(suspicions: Sequence[Floats]) -> dict[str, float]:
    """Rank agreement and overlap of the top tenth between seeds, mean over pairs (NaN for one seed)."""
    spearman, overlap = [], []
    for one, two in itertools.combinations(suspicions, 2):
        spearman.append(spearmanr(one, two)[0])
        overlap.append(jaccard(one, two, 0.1))
    if not spearman:
        return {"seed_spearman": float("nan"), "jaccard_top10": float("nan")}
    return {"seed_spearman": float(np.mean(spearman)), "jaccard_top10": float(np.mean(overlap))}


def jaccard(one: Floats, two: Floats, share: float) -> float:
    """Overlap of the highest ``share`` of both: size of the intersection over that of the union."""
    size = round(share * len(one))
    a, b = (set(np.argsort(-s)[:size].tolist()) for s in (one, two))
    return len(a & b) / len(a | b)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, by Student's t."""
    error = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(error)
