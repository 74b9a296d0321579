"""Rows that act alike: near duplicates, neighbours and weak groups, by the vectors of the gradient store.

Two rows' cosine is that of what the run did with them, in the metric of queries: 1 says that no query tells them apart
but by size, -1 that they pull every query in opposite directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ine_callback.errors import InfluenceError
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Floats

DUPLICATE = 0.98  # cosine of near duplicates
BLOCK = 2048  # rows that are compared at once
WEAK = 0.1  # a row of a weak group has at most this share of the median row's size

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
    if not 0 <= row < len(store.seen) or not store.seen[row]:
        raise InfluenceError(f"neighbours: row {row} has no vector: it was never observed, or there is no such row.")
    if k < 1:
        raise InfluenceError(f"neighbours: k={k} must be at least 1.")
    own = store.unit_rows([row])[0]
    cosines = np.concatenate([store.unit_rows(part) @ own for part in _parts(len(store.seen))]).astype(np.float64)
    cosines[~store.seen] = -np.inf
    cosines[row] = -np.inf
    order = np.argsort(-cosines, kind="stable")[: min(k, int(store.seen.sum()) - 1)]
    return Neighbours(row, order, cosines[order])


def near_duplicates(store: StoredVectors, cosine: float = DUPLICATE) -> list[Rows]:
    """Groups of rows that the run could hardly tell apart, the largest first: chains of pairs above a cosine.

    Every row is compared with every other, in blocks: N^2 k products.

    Args:
        store: The run's.
        cosine: Least cosine of a pair.

    Raises:
        InfluenceError: If the cosine is none.
    """
    if not 0 < cosine <= 1:
        raise InfluenceError(f"near_duplicates: cosine={cosine} must be above 0 and at most 1.")
    leader = np.arange(len(store.seen))
    parts = list(_parts(len(store.seen)))
    for number, first in enumerate(parts):
        mine = store.unit_rows(first)
        for second in parts[number:]:
            close = np.argwhere(mine @ store.unit_rows(second).T >= cosine)
            for one, other in close + np.array([first.start, second.start]):
                if one < other:
                    _join(leader, one, other)
    found: dict[int, list[int]] = {}
    for row in np.flatnonzero(store.seen):
        found.setdefault(_root(leader, int(row)), []).append(int(row))
    groups = [np.array(rows) for rows in found.values() if len(rows) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), rows[0]))


def weak_rows(store: StoredVectors, share: float = WEAK) -> Rows:
    """Rows that moved no query by much: their vectors have at most this share of the median vector's length."""
    sizes = np.concatenate([np.linalg.norm(part, axis=1) for _, part in store.chunks()] or [np.zeros(0)]) * store.scale
    seen = np.flatnonzero(store.seen)
    weak: Rows = seen[sizes[seen] <= share * np.median(sizes[seen])] if len(seen) else seen
    return weak


def _parts(rows: int) -> Iterator[slice]:
    for start in range(0, rows, BLOCK):
        yield slice(start, min(start + BLOCK, rows))


def _root(leader: NDArray[np.int64], row: int) -> int:
    while leader[row] != row:
        leader[row] = leader[leader[row]]
        row = int(leader[row])
    return int(row)


def _join(leader: NDArray[np.int64], one: int, other: int) -> None:
    first, second = sorted((_root(leader, one), _root(leader, other)))
    leader[second] = first
