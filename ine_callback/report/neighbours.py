"""Rows that act alike: neighbours, near duplicates and weak rows, by the vectors of the gradient store.

Two rows' cosine is that of what the run did with them, in the metric of queries: 1 says that no query tells them apart
but by size, -1 that they pull every query in opposite directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ine_callback.errors import InfluenceError
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Floats

CLOSER, LEAST = 4.0, 0.7  # standard deviations, and a cosine; docs/methods/store.md has what they find
SAMPLE, PRODUCTS = 1_000, 5e10  # rows, and products of two numbers at most, that tell how near rows are in a run
BLOCK = 2048  # rows that are compared at once
ROUNDING = 4e-6  # of a squared distance
QUARTILES = 1.349  # standard deviations between the quartiles of a normal distribution
LEADING = 64  # numbers of a row by which most pairs are ruled out
WEAK = 0.1  # a weak row has at most this share of the median row's size

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """The rows nearest to one.

    Attributes:
        row: The row.
        rows: Its neighbours, the nearest first [k].
        cosines: Theirs [k].
    """

    row: int
    rows: Rows
    cosines: Floats

    def __str__(self) -> str:
        each = (f"{row} ({cosine:+.3f})" for row, cosine in zip(self.rows, self.cosines, strict=True))
        return f"row {self.row}: {', '.join(each)}"


def neighbours(store: StoredVectors, row: int, k: int = 10) -> Neighbours:
    """The k rows whose vectors have the largest cosines with a row's.

    Args:
        store: The run's.
        row: Dataset index.
        k: How many; fewer where there are fewer rows with a vector.

    Raises:
        InfluenceError: If the row has no vector, or k is no count.
    """
    rows, cosines = nearest(store, np.array([checked(store, row)]), k)
    return Neighbours(row, rows[0], cosines[0])


def checked(store: StoredVectors, row: int) -> int:
    """The row, which has a vector.

    Raises:
        InfluenceError: If it has none.
    """
    if not 0 <= row < len(store.seen) or not store.seen[row]:
        raise InfluenceError(f"neighbours: row {row} has no vector: it was never observed, or there is no such row.")
    return row


def nearest(store: StoredVectors, which: Rows, k: int) -> tuple[Rows, Floats]:
    """The k rows nearest to each of some, and their cosines [n, k]: every row is compared, in blocks (n N products).

    Args:
        store: The run's.
        which: Rows that have vectors [n].
        k: How many; fewer where there are fewer rows with a vector.

    Raises:
        InfluenceError: If k is no count.
    """
    if k < 1:
        raise InfluenceError(f"neighbours: k={k} must be at least 1.")
    k = min(k, int(store.seen.sum()) - 1)
    own = store.unit_rows(which)
    rows, cosines = np.zeros((len(which), 0), np.int64), np.zeros((len(which), 0))
    for part in _parts(len(store.seen)):
        found = (own @ store.unit_rows(part).T).astype(np.float64)
        found[:, ~store.seen[part]] = -np.inf
        itself = np.flatnonzero((which >= part.start) & (which < part.stop))
        found[itself, which[itself] - part.start] = -np.inf
        few = np.argpartition(-found, min(k, found.shape[1]) - 1, axis=1)[:, :k]
        rows = np.concatenate([rows, few + part.start], 1)
        cosines = np.concatenate([cosines, np.take_along_axis(found, few, 1)], 1)
        order = np.lexsort((rows, -cosines))[:, :k]  # of equal ones the first
        rows, cosines = np.take_along_axis(rows, order, 1), np.take_along_axis(cosines, order, 1)
    return rows, cosines


def duplicate_cosine(store: StoredVectors) -> float:
    """The cosine from which two rows are near duplicates: how alike rows are at all depends on the training.

    Of the distances ``sqrt(2 - 2 cosine)`` of rows to their nearest ones the logarithms have a median and, by their
    quartiles, a standard deviation; near duplicates are four of these below, with cosines of at least .7.
    """
    seen = np.flatnonzero(store.seen)
    most = min(SAMPLE, len(seen), max(8, int(PRODUCTS / (len(store.seen) * store.dimensions))))
    if len(seen) < 2:
        return 1.0
    some = np.sort(np.random.default_rng(0).choice(seen, most, replace=False))
    distance = np.log(np.sqrt(np.maximum(2 - 2 * nearest(store, some, 1)[1], ROUNDING)))
    low, middle, high = np.quantile(distance, [0.25, 0.5, 0.75])
    squared = np.exp(2 * (middle - CLOSER * (high - low) / QUARTILES))
    return max(LEAST, float(1 - max(squared, ROUNDING) / 2))


def near_duplicates(store: StoredVectors, cosine: float) -> list[Rows]:
    """Groups of rows that the run could hardly tell apart, the largest first: chains of pairs above a cosine.

    Every row is compared with every other, in blocks. With u the leading numbers of a row of length 1 and w the length
    of the others, ``u u' + w w'`` is at least the cosine; so most pairs are ruled out by few numbers.

    Args:
        store: The run's.
        cosine: Least cosine of a pair.

    Raises:
        InfluenceError: If the cosine is none.
    """
    if not 0 < cosine <= 1:
        raise InfluenceError(f"near_duplicates: cosine={cosine} must be above 0 and at most 1.")
    rows = len(store.seen)
    pairs = [np.zeros((0, 2), np.int64)]
    bounds = np.concatenate(
        [_bound(store.unit_components(part)) for part in _parts(rows)] or [np.zeros((0, 1), np.float32)]
    )
    for first in _parts(rows):
        for second in _parts(rows, first.start):
            close = np.argwhere(bounds[first] @ bounds[second].T >= cosine)
            close += np.array([first.start, second.start])
            pairs += [_above(store, each, cosine) for each in _split(close[close[:, 0] < close[:, 1]])]
    one, other = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(rows, rows))
    which = connected_components(graph, directed=False)[1]
    which[~store.seen] = -1
    order = np.argsort(which, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
    return sorted((g for g in groups if len(g) > 1 and store.seen[g[0]]), key=lambda g: (-len(g), g[0]))


def _bound(unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """The leading components of rows of length 1, and the length of the others [n, d + 1]."""
    rest = np.linalg.norm(unit[:, LEADING:], axis=1, keepdims=True)
    return np.concatenate([unit[:, :LEADING], rest * (1 + 1e-5) + 1e-6], 1)  # rounding must not lose a pair


def _above(store: StoredVectors, pairs: Rows, cosine: float) -> Rows:
    """Those of the pairs [P, 2] whose cosines are large enough."""
    found = np.einsum("pk,pk->p", store.unit_rows(pairs[:, 0]), store.unit_rows(pairs[:, 1]))
    above: Rows = pairs[found >= cosine]
    return above


def _split(pairs: Rows) -> Iterator[Rows]:
    for start in range(0, len(pairs), BLOCK):
        yield pairs[start : start + BLOCK]


def weak_rows(store: StoredVectors, share: float = WEAK) -> Rows:
    """Rows that moved no query by much: their vectors have at most this share of the median vector's length."""
    sizes = np.concatenate([np.linalg.norm(part, axis=1) for _, part in store.chunks()] or [np.zeros(0)]) * store.size
    seen = np.flatnonzero(store.seen)
    weak: Rows = seen[sizes[seen] <= share * np.median(sizes[seen])] if len(seen) else seen
    return weak


def _parts(rows: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, rows, BLOCK):
        yield slice(first, min(first + BLOCK, rows))
