r"""Weak groups: rows that move a query together, none of which is significant alone.

1. **Groups** of rows whose vectors in the gradient store point the same way (k-means of directions). What the scores
   themselves say is taken out first: with u a row's direction, s its score over its vector's length and b the
   regression of u on s over the rows, ``u - s b`` is grouped. So a group cannot have been made by the score on which it
   is tested: rows alike in everything else either score alike, or they do not.
2. **Test**, on each query, of the rows that are not flagged alone (q > .05). Two things must be told from chance, so p
   is the larger of both p-values: that the rows score otherwise than any rows do, ``t = (mean of mu - mean of all)
   sqrt(m) / sd`` against t of the same groups with the rows' scores permuted (pooled over groups); and that their
   sum is, on the same side, more than their batch-mates' would be (:meth:`InfluenceReport.group`). q is the false
   discovery rate over all groups and queries (Benjamini-Hochberg).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.special import ndtr

from ine_callback.report.neighbours import LEADING, WEAK
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Floats, Scores
from ine_callback.stats.hypothesis_tests import benjamini_hochberg, permutation_p

RATE = 0.05  # default false discovery rate
ALONE = 0.05  # rows with a q-value up to this are significant alone
SIZE, MOST_GROUPS, FEWEST = 20, 200, 5  # rows of a group on average, groups, and rows of one that is tested
MOST_QUERIES = 24
PERMUTATIONS = 400  # that make the null
STEPS = 20  # of k-means

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class WeakGroup:
    """Rows that act alike and move a query together, none of them significant alone.

    Attributes:
        rows: Dataset indices [m].
        query: Name of the query.
        mu: Sum of their scores; above 0: training on them lowers the query (helpful).
        t: Their mean score less that of all rows, in its standard errors.
        p: The larger p-value of "these rows score as any rows do" and "as their batch-mates do".
        q: False discovery rate over all groups and queries.
    """

    rows: Rows
    query: str
    mu: float
    t: float
    p: float
    q: float

    def __str__(self) -> str:
        verb = "lower" if self.mu > 0 else "raise"
        shown = ", ".join(map(str, self.rows[:8])) + (", …" if len(self.rows) > 8 else "")
        return f"{len(self.rows)} rows {verb} {self.query!r} together (mu {self.mu:+.2g}, q {self.q:.2g}): {shown}"


def on_data(scores: Scores) -> list[int]:
    """Columns of the queries on data: self-influence has no query that rows could move together."""
    return [column for column, query in enumerate(scores.queries) if query.kind != "self"]


def weak_groups(store: StoredVectors, scores: Scores, columns: Sequence[int], q: float) -> list[WeakGroup]:
    """The groups found on some queries: those that raise one first, each kind by the size of its sum.

    Args:
        store: The run's.
        scores: The run's, of the same rows.
        columns: Of the queries.
        q: Greatest false discovery rate.
    """
    which = list(columns)[:MOST_QUERIES]
    rows = np.flatnonzero(store.seen & np.isfinite(scores.mu[:, which]).all(1))
    if not which or len(rows) < 2 * SIZE:
        return []
    groups = grouped(store, rows, scores.mu[rows][:, which])
    found, tests = [], [_tested(scores, rows, groups, k) for k in which]
    rates = benjamini_hochberg(np.concatenate([p for _, p in tests])).reshape(len(which), -1)
    for column, (t, p), rate in zip(which, tests, rates, strict=True):
        for group in np.flatnonzero(rate <= q).tolist():
            members = rows[(groups == group) & (scores.q[rows, column] > ALONE)]
            mu, name = float(scores.mu[members, column].sum()), scores.queries[column].name
            found.append(WeakGroup(members, name, mu, float(t[group]), float(p[group]), float(rate[group])))
    return sorted(found, key=lambda one: (one.mu > 0, -abs(one.mu)))


def grouped(store: StoredVectors, rows: Rows, mu: Floats) -> Rows:
    """Each row's group [n], made of what its vector says beside its scores mu [n, Q]."""
    length = np.linalg.norm(store.numbers(rows), axis=1)
    strong = np.maximum(length, WEAK * np.median(length))  # a row without a direction goes anywhere
    u = store.unit_components(rows)[:, :LEADING].astype(np.float64)
    s = mu / (strong * np.maximum(store.size[rows], 1e-30))[:, None]
    s = s / np.maximum(np.sqrt(np.square(s).mean(0)), 1e-300)
    u = u - s @ np.linalg.lstsq(s, u, rcond=None)[0]
    u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
    count = min(MOST_GROUPS, max(2, len(rows) // SIZE))
    first = np.random.default_rng(0).choice(len(rows), count, replace=False)
    found: Rows = kmeans2(u, u[first], STEPS, minit="matrix", missing="warn")[1].astype(np.int64)
    return found


def _tested(scores: Scores, rows: Rows, groups: Rows, column: int) -> tuple[Floats, Floats]:
    """Each group's t and p on a query; NaN for those that have too few rows."""
    alone, count = scores.q[rows, column] > ALONE, int(groups.max()) + 1
    mine, mu, sd = groups[alone], scores.mu[rows[alone], column], scores.null_sd[rows[alone], column]
    x = mu - mu.mean()
    t = _t(x, mine, count)
    random = np.random.default_rng(0)
    null = np.concatenate([_t(x, random.permutation(mine), count) for _ in range(PERMUTATIONS)])
    total, variance = np.bincount(mine, mu, count), np.bincount(mine, np.square(sd), count)
    of_mates = 2 * ndtr(-np.abs(total) / np.sqrt(np.maximum(variance, 1e-300)))
    of_mates[t * total < 0] = 1.0  # they help less than most and do not harm, or the reverse
    return t, np.fmax(permutation_p(t, null), np.where(np.isnan(t), np.nan, of_mates))


def _t(x: Floats, groups: Rows, count: int) -> Floats:
    """t of each group's mean of x."""
    m = np.bincount(groups, minlength=count)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.bincount(groups, x, count) / m
        variance = (np.bincount(groups, x * x, count) - m * mean**2) / (m - 1)
        return np.where((m >= FEWEST) & (variance > 0), mean * np.sqrt(m / np.maximum(variance, 1e-300)), np.nan)
