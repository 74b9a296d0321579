"""Attributions by one method from several runs: how far two agree, and their mean with the scatter between runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ine_callback.scores import Attribution, Check, Floats, Stage
from ine_callback.stats.hypothesis_tests import benjamini_hochberg
from ine_callback.stats.ranks import spearman

EXTREME = 0.05  # share of the rows at an end whose agreement is told


@dataclass(frozen=True)
class MethodAgreement:
    """How far two runs' scores by one method agree on one query.

    Attributes:
        method: Name of the method.
        at: Finished epochs when it ran, or ``"end"``.
        query: Name of the query.
        scored: Number of rows that both scored.
        rank_correlation: Spearman's correlation of the scores; NaN with fewer than two different ones.
        top: Jaccard index of the 5 % of rows with the largest scores.
        bottom: The same for the smallest scores.
        passed: Whether all checks were passed, in each run.
    """

    method: str
    at: Stage
    query: str
    scored: int
    rank_correlation: float
    top: float
    bottom: float
    passed: tuple[bool, bool]


def agreements(one: Sequence[Attribution], other: Sequence[Attribution]) -> tuple[MethodAgreement, ...]:
    """All pairs of a method's stage and a query that both runs have.

    Example:
        >>> from ine_callback.scores import example_attribution
        >>> found = agreements([example_attribution()], [example_attribution()])
        >>> round(found[0].rank_correlation, 6), found[0].scored
        (1.0, 5)
    """
    theirs = {(each.method, each.at): each for each in other}
    found = []
    for here in one:
        there = theirs.get((here.method, here.at))
        names = [] if there is None else [query.name for query in there.queries]
        for query in here.queries:
            if there is not None and query.name in names:
                found.append(_agreement(here, there, query.name))
    return tuple(found)


def _agreement(here: Attribution, there: Attribution, query: str) -> MethodAgreement:
    _, a, b = np.intersect1d(here.rows, there.rows, return_indices=True)
    one, other = here.ranking[a, here.column(query)], there.ranking[b, there.column(query)]
    both = np.isfinite(one) & np.isfinite(other)
    one, other = one[both], other[both]
    rank = spearman(one, other) if len(one) > 1 else math.nan
    ends = (_jaccard(-one, -other), _jaccard(one, other))
    return MethodAgreement(here.method, here.at, query, len(one), rank, *ends, (here.reliable, there.reliable))


def _jaccard(one: Floats, other: Floats) -> float:
    """Shared share of the smallest values."""
    if not len(one):
        return math.nan
    count = max(1, round(EXTREME * len(one)))
    a, b = (set(np.argsort(values, kind="stable")[:count].tolist()) for values in (one, other))
    return len(a & b) / len(a | b)


def combine_attributions(runs: Sequence[Sequence[Attribution]]) -> tuple[Attribution, ...]:
    """The mean of the runs' scores for every method, stage, row and query that all of them have.

    ``se`` is the standard error of that mean by the scatter between runs, sqrt(variance / R), and ``p`` the two-sided
    normal p-value of "the score averaged over runs is 0"; columns are averaged, but for the standard errors of one run
    alone, which are left out. A check is passed if it is in every run; its value is that of the first failed run, or of
    the first run. Scores of layers, tokens and traces stay with the single runs.
    """
    by_stage = [{(each.method, each.at): each for each in run} for run in runs]
    common = [key for key in by_stage[0] if all(key in run for run in by_stage)]
    return tuple(_combined([run[key] for run in by_stage]) for key in common)


def _combined(runs: list[Attribution]) -> Attribution:
    rows = runs[0].rows
    for run in runs[1:]:
        rows = np.intersect1d(rows, run.rows)
    queries = tuple(q for q in runs[0].queries if all(q in run.queries for run in runs))
    scores = np.stack([_picked(run, run.scores, rows, [q.name for q in queries]) for run in runs])
    mean, se = scores.mean(0), scores.std(0, ddof=1) / math.sqrt(len(runs))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(se > 0, 2 * ndtr(-np.abs(mean / se)), np.nan)
    names = [n for n in runs[0].columns if not n.endswith("_se") and all(n in run.columns for run in runs)]
    columns = {
        name: np.stack([_picked(run, run.columns[name], rows, [q.name for q in queries]) for run in runs]).mean(0)
        for name in names
    }
    doubtful = [_picked(r, r.doubtful, rows, [q.name for q in queries]) for r in runs if r.doubtful is not None]
    return replace(
        runs[0],
        rows=rows,
        queries=queries,
        scores=mean,
        se=se,
        p=p,
        q=benjamini_hochberg(p),
        columns=columns,
        doubtful=np.logical_and.reduce(doubtful) if len(doubtful) == len(runs) else None,
        layers=None,
        tokens=None,
        arrays={},
        checks=_checks(runs),
        headline=f"mean of {len(runs)} runs · {len(rows):,} rows",
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
    )


def _picked(run: Attribution, values: NDArray[Any], rows: NDArray[np.int64], queries: Sequence[str]) -> NDArray[Any]:
    order = np.argsort(run.rows)
    at = order[np.searchsorted(run.rows[order], rows)]
    return values[at][:, [run.column(name) for name in queries]]


def _checks(runs: Sequence[Attribution]) -> tuple[Check, ...]:
    found = []
    for check in runs[0].checks:
        same = [each for run in runs for each in run.checks if each.name == check.name]
        found.append(next((each for each in same if not each.passed), check))
    return tuple(found)
