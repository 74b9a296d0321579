"""Rows of a report with their numbers, as tables; the questions are :class:`InfluenceReport`'s methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.table import ScoreTable
from ine_callback.scores import Scores
from ine_callback.utilities.validate import row_ids, threshold
from ine_callback.utilities.words import tails

NORMAL_95 = 1.96
Rows = NDArray[np.int64]


def columns(scores: Scores, rows: Rows, which: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The fields of RowScore, one entry for every pair of a row and a query's column."""
    parts = {name: getattr(scores, name)[rows, which] for name in ("mu", "se", "p", "q", "t", "p_t")}
    return {
        "row": rows,
        "query": np.array([query.name for query in scores.queries], object)[which],
        "mu": parts["mu"],
        "se": parts["se"],
        "low": parts["mu"] - NORMAL_95 * parts["se"],
        "high": parts["mu"] + NORMAL_95 * parts["se"],
        **{name: parts[name] for name in ("p", "q", "t", "p_t")},
        "observations": scores.observations[rows],
        "mean_loss": scores.mean_loss[rows],
    }


def everything(scores: Scores) -> tuple[Rows, NDArray[np.int64]]:
    """All pairs of a row and a query's column, one query after the other."""
    rows, queries = scores.mu.shape
    return np.tile(np.arange(rows), queries), np.repeat(np.arange(queries), rows)


def table(scores: Scores, rows: Rows, column: int | NDArray[np.int64], title: str = "", note: str = "") -> ScoreTable:
    """The rows' numbers on one query, or on one query each."""
    which = np.broadcast_to(np.asarray(column), rows.shape)
    kinds = np.array([query.kind for query in scores.queries])[which]
    return ScoreTable(columns(scores, rows, which), kinds, title, note)


def smallest(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Positions of the k smallest values, in their order; of equal ones the first. Sorts no more than it must.

    >>> smallest(np.array([3.0, 1.0, 2.0, 1.0]), 3).tolist()
    [1, 3, 2]
    """
    few = np.arange(len(values))
    if 0 < k < len(values):
        few = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    return few[np.argsort(values[few], kind="stable")][:k]


def extreme(scores: Scores, k: int, column: int, largest: bool) -> ScoreTable:
    """See :meth:`InfluenceReport.top` and :meth:`InfluenceReport.bottom`."""
    who = "top" if largest else "bottom"
    if k < 1:
        raise ValueError(f"InfluenceReport.{who}: k is {k!r}; give a number of rows, at least 1")
    mu, query = scores.mu[:, column], scores.queries[column]
    rows = np.flatnonzero(np.isfinite(mu))
    rows = rows[smallest(-mu[rows] if largest else mu[rows], k)]
    ends = tails(query.kind)
    return table(scores, rows, column, f"{ends.upper if largest else ends.lower} · {query.name}")


def flagged(scores: Scores, q: float, column: int) -> ScoreTable:
    """See :meth:`InfluenceReport.flagged`."""
    mu = scores.mu[:, column]
    rows = np.flatnonzero((scores.q[:, column] <= threshold(q, "InfluenceReport.flagged")) & np.isfinite(mu))
    rows = rows[np.argsort(-np.abs(mu[rows]), kind="stable")]
    return table(scores, rows, column, f"Flagged (q ≤ {q:g}) · {scores.queries[column].name}")


def on_every_query(scores: Scores, row: int) -> ScoreTable:
    """See :meth:`InfluenceReport.row`."""
    which = int(row_ids([row], len(scores.observations), "InfluenceReport.row")[0])
    all_queries = np.arange(len(scores.queries))
    missing = f"row {which} was never observed: it has no score, which is not a score of 0"
    note = "" if scores.observations[which] else missing
    return table(scores, np.full(all_queries.size, which), all_queries, f"Row {which}", note)
