"""How one run's scores compare with the truth of retraining, over a protocol's groups and over protocols."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.family.recorded import Run
from benchmarks.family.tasks import QUERIES, Task
from benchmarks.family.truth import Truth
from benchmarks.metrics import Floats, agreement
from benchmarks.randomness import Z95

# What is shown of a protocol: heading, path into its results, and what a perfect score has.
COLUMNS: dict[str, tuple[tuple[str, ...], float]] = {
    "large: rank": (("default", "large", "spearman_per_query"), 1),
    "slope": (("default", "large", "slope"), 1),
    "raw": (("default", "large", "raw_slope"), 1),
    "small: rank": (("default", "small", "spearman_per_query"), 1),
    "slope ": (("default", "small", "slope"), 1),
    "raw ": (("default", "small", "raw_slope"), 1),
    "single: rank": (("default", "single", "spearman_per_query"), 1),
    "slope  ": (("default", "single", "slope"), 1),
    "own: rank": (("default", "own", "spearman"), 1),
    "slope   ": (("default", "own", "slope"), 1),
    "unit": (("default", "unit"), 1),
    "cover": (("default", "coverage"), 0.95),
    "marked": (("default", "marked"), 0),
    "first order: large": (("first order", "large", "spearman_per_query"), 1),
    "small": (("first order", "small", "spearman_per_query"), 1),
    "fall": (("first order", "completeness"), 1),
    "known": (("truth", "small", "reliability"), 1),
}
LEGEND = """\
rank: Spearman over groups, mean over 50 held-out losses (large: groups of 50-100 rows; small: 10-25 rows, half of them
clusters; single rows; own: single rows on their own loss). slope: of the true mu on the score, through all queries,
below 1 where the score is too large; raw: of the true raw shift on the predicted one, median over queries. unit: true
standard deviation over retrainings by the predicted one, geometric mean over queries. cover: 95 % intervals that hold
the other runs' mean. marked: share of the runs whose report calls sizes not reliable. first order: ranks without the
discount; fall: predicted fall of the mean query over the run by the real one. known: reliability of the truth for small
groups. worst: farthest from perfect, slopes as ratios.
"""


def judge(runs: Sequence[Run], truth: Truth, task: Task) -> dict[str, Any]:
    """All measures of several runs of one protocol, means over the runs."""
    out: dict[str, Any] = {}
    for size, groups in _sets(task).items():
        which = _positions(size, task)
        mu, shift = (a[which, :QUERIES] for a in (truth.mu(_stem(size)), truth.shift(_stem(size))))
        mean = truth.mean_mu(_stem(size))[which]
        found = []
        for run in runs:
            row = agreement(run.mu[:, :QUERIES], mu, groups)
            equal = agreement(run.mu[:, :QUERIES], equal_training(mu, groups), groups)
            row |= {f"{key}_equal_training": equal[key] for key in ("spearman_per_query", "slope")}
            row["slope_median_query"] = median_slope(run.mu[:, :QUERIES], mu, groups)
            row["raw_slope"] = median_slope(run.raw[:, :QUERIES], shift, groups)
            of_mean = agreement(run.mu[:, QUERIES:], mean, groups)
            row |= {"spearman_mean_query": of_mean["spearman_per_query"], "slope_mean_query": of_mean["slope"]}
            found.append(row)
        out[size] = _mean(found)
    out["own"] = _mean([_own(run, truth, task) for run in runs])
    out |= _mean([_sizes(run, truth) for run in runs])
    out["coverage"] = coverage(runs)
    return out


def equal_training(truth: Floats, groups: Sequence[NDArray[np.int64]]) -> Floats:
    """The truth [groups, Q] less what it has in common for all groups: fewer rows are also fewer steps.

    That part is proportional to a group's size, and scores, which compare rows with their batch-mates, leave it out.
    Its factor is fitted to the groups, for each query.
    """
    size = np.array([len(group) for group in groups], dtype=float)[:, None]
    less: Floats = truth - size * (size * truth).sum(0) / (size**2).sum(0)
    return less


def median_slope(scores: Floats, truth: Floats, groups: Sequence[NDArray[np.int64]]) -> float:
    """Slope of the truth [groups, Q] on group sums of the scores [N, Q] through the origin, median over queries.

    Each query has its own scale here, so that those with large losses do not decide for all.
    """
    estimate = np.stack([scores[group].sum(0) for group in groups])
    return float(np.median((estimate * truth).sum(0) / (estimate**2).sum(0)))


def coverage(runs: Sequence[Run]) -> float:
    """How often ``mu +- 1.96 se`` of a run holds the other runs' mean, over rows and queries; NaN for one run.

    The mean of R - 1 runs scatters too: the interval is widened by sqrt(1 + 1 / (R - 1)), so that it covers 95 % for
    any number of runs if ``se`` is right.
    """
    if len(runs) < 2:
        return float("nan")
    mu, held = np.stack([run.mu for run in runs]), []
    for k, run in enumerate(runs):
        others = np.delete(mu, k, 0).mean(0)
        width = Z95 * run.se * np.sqrt(1 + 1 / (len(runs) - 1))
        known = np.isfinite(width[:, :QUERIES])
        held.append((np.abs(mu[k] - others) <= width)[:, :QUERIES][known].mean() if known.any() else np.nan)
    return float(np.nanmean(held)) if np.isfinite(held).any() else float("nan")


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and worst protocol of every column."""
    rows = list(rows)
    out: dict[str, dict[str, float]] = {"median": {}, "worst": {}}
    for name, (path, perfect) in COLUMNS.items():
        values = np.array([at(row, path) for row in rows])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        ratio = path[-1] in ("slope", "raw_slope", "unit", "completeness")
        # a ratio of 0 or below is infinitely far from 1
        distance = np.abs(np.log(np.maximum(values, 1e-12))) if ratio else np.abs(values - perfect)
        out["median"][name], out["worst"][name] = float(np.median(values)), float(values[distance.argmax()])
    return out


def at(row: dict[str, Any], path: Sequence[str]) -> float:
    """A number deep in a protocol's results; NaN where it is missing."""
    found: Any = row
    for key in path:
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return float(found) if isinstance(found, int | float) else float("nan")


def _sets(task: Task) -> dict[str, list[NDArray[np.int64]]]:
    """The groups by size, and the small ones also apart: at random, and clusters."""
    sets = {size: [group.numpy() for group in groups] for size, groups in task.groups.items()}
    half = len(sets["small"]) // 2
    return sets | {"small random": sets["small"][:half], "small clusters": sets["small"][half:]}


def _stem(size: str) -> str:
    return size.partition(" ")[0]


def _positions(size: str, task: Task) -> slice:
    half = len(task.groups["small"]) // 2
    return {"small random": slice(half), "small clusters": slice(half, None)}.get(size, slice(None))


def _own(run: Run, truth: Truth, task: Task) -> dict[str, float]:
    """Self-influence of the single rows; the slope has an intercept, for scores are differences to an average row."""
    true, score = np.diagonal(truth.mu("single")[:, QUERIES:]), run.own[task.singles.numpy()]
    return {"spearman": float(spearmanr(score, true)[0]), "slope": float(np.polyfit(score, true, 1)[0])}


def _sizes(run: Run, truth: Truth) -> dict[str, float]:
    """The unit against the truth, and the predicted fall of the mean query against the real one."""
    unit, sd = run.unit[:QUERIES], truth.sd[:QUERIES]
    return {
        "unit": float(np.exp(np.mean(np.log(sd / unit)))),
        "unit_spearman": float(spearmanr(unit, sd)[0]),
        "completeness": float(run.predicted[QUERIES] / run.fall[QUERIES]),
        "seconds": run.seconds,
        "marked": float(run.marked),
    }


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
