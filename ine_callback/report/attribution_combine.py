"""Attributions by one method from several runs: how far two agree, and their mean with the scatter between runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.attribution_view import LEGEND, moment
from ine_callback.report.combine import between, mean_over
from ine_callback.scores import Attribution, Check, Floats, Stage
from ine_callback.stats.hypothesis_tests import benjamini_hochberg
from ine_callback.stats.ranks import spearman

END_FRACTION = 0.05  # of the rows, at the end whose agreement is reported


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
    """Fraction of the smallest values that both have in common."""
    if not len(one):
        return math.nan
    count = max(1, round(END_FRACTION * len(one)))
    a, b = (set(np.argsort(values, kind="stable")[:count].tolist()) for values in (one, other))
    return len(a & b) / len(a | b)


def combine_attributions(runs: Sequence[Sequence[Attribution]]) -> tuple[tuple[Attribution, ...], list[str]]:
    """The mean of the runs' scores for every method, stage, row and query that all have, and notes on what is left out.

    ``se``, ``p`` and ``q`` come from the scatter between runs by the formulas of ``combine.py``, and are about "the
    score averaged over runs is 0"; a run whose score is NaN does not count. Columns are averaged, and those that are
    standard errors (``name_se``) become the mean's. A check is passed if it is in every run; its value is that of the
    first failed run, or of the first run. Scores of layers, tokens and traces stay with the single runs.
    """
    by_stage = [{(each.method, each.at): each for each in run} for run in runs]
    found: list[Attribution] = []
    notes: list[str] = []
    for method, at in dict.fromkeys(key for run in by_stage for key in run):
        each = [run[method, at] for run in by_stage if (method, at) in run]
        if any(query.kind == "estimand" for query in each[0].queries):
            notes.append(
                f"{method}, {moment(at)}, are left out of the combined report: they are effects on single runs. "
                "Estimate them anew with the combined report's loss or scores as the outcome."
            )
            continue
        combined = _combined(each) if len(each) == len(runs) else None
        if combined is not None:
            found.append(combined)
            continue
        shared = len(each) == len(runs)
        why = "no row and query is in all runs" if shared else f"{len(each)} of {len(runs)} runs have it"
        notes.append(f"{method}, {moment(at)}, is left out of the combined report: {why}.")
    return tuple(found), notes


def _combined(runs: list[Attribution]) -> Attribution | None:
    """The runs' mean; None where they have no row or no query in common."""
    rows = runs[0].rows
    for run in runs[1:]:
        rows = np.intersect1d(rows, run.rows)
    known = [{(query.name, query.kind) for query in run.queries} for run in runs]
    queries = tuple(query for query in runs[0].queries if all((query.name, query.kind) in each for each in known))
    if not rows.size or not queries:
        return None
    picked = partial(_picked, runs, rows, [query.name for query in queries])
    scores, se, p = _over_runs(picked([run.scores for run in runs]), picked([run.se for run in runs]))
    columns: dict[str, Floats] = {}
    for name in [name for name in runs[0].columns if all(name in run.columns for run in runs)]:
        if name.endswith("_se"):
            continue
        errors = [run.columns.get(f"{name}_se") for run in runs]
        columns[name], spread, _ = _over_runs(picked([run.columns[name] for run in runs]), picked(errors))
        if all(error is not None for error in errors):
            columns[f"{name}_se"] = spread
    doubtful = None
    if all(run.doubtful is not None for run in runs):
        doubtful = np.asarray(picked([run.doubtful for run in runs]).all(0))
    first = runs[0]
    return Attribution(
        first.method,
        rows,
        queries,
        scores,
        se,
        p,
        benjamini_hochberg(p),
        columns=columns,
        ranked_by=first.ranked_by if first.ranked_by in columns else "",
        doubtful=doubtful,
        checks=_checks(runs),
        settings=first.settings,
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        title=first.title,
        headline=f"mean of {len(runs)} runs · {len(rows):,} rows",
        legend=f"{LEGEND} It is the mean of {len(runs)} runs; ± is its standard error by their scatter, and q tests "
        '"the mean over runs is 0".',
        at=first.at,
    )


def _picked(
    runs: Sequence[Attribution], rows: NDArray[np.int64], queries: Sequence[str], values: Sequence[NDArray[Any] | None]
) -> NDArray[Any]:
    """Each run's values [runs, R, Q] of these rows and queries; NaN of a run that has none."""
    found = []
    for run, each in zip(runs, values, strict=True):
        order = np.argsort(run.rows)
        at = order[np.searchsorted(run.rows[order], rows)]
        each = np.full(run.scores.shape, np.nan) if each is None else each
        found.append(each[at][:, [run.column(name) for name in queries]])
    return np.stack(found)


def _over_runs(values: Floats, within: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, its standard error and p-value [R, Q] of values [runs, R, Q] with their errors within the runs."""
    values = np.where(np.isfinite(values), values, np.nan)
    count = np.isfinite(values).sum(0)
    mean, se, p = (np.full(count.shape, np.nan) for _ in range(3))
    for k in range(count.shape[1]):
        mean[:, k] = mean_over(values[..., k], np.isfinite(values[..., k]))
        fit, se[:, k] = between(values[..., k], mean[:, k], count[:, k], within[..., k])
        p[:, k] = np.where(se[:, k] > 0, fit.p, np.nan)
    return mean, se, p


def _checks(runs: Sequence[Attribution]) -> tuple[Check, ...]:
    found = []
    for check in runs[0].checks:
        same = [each for run in runs for each in run.checks if each.name == check.name]
        found.append(next((each for each in same if not each.passed), check))
    return tuple(found)
