"""Neighbours by FAISS: an index in memory, for many rows' neighbours among millions.

Without it (:func:`~ine_callback.report.neighbours.nearest`) each search compares a row with all others. The index keeps
one byte for each number, sorts the rows into ``4 sqrt(N)`` lists and searches the nearest ones. Which rows are found is
approximate then; their cosines are those of the stored numbers. Up to ``EXACT`` rows all are compared.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.neighbours import Neighbours, checked
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Floats
from ine_callback.utilities.optional import need

EXACT = 20_000  # rows up to which all are compared
CHUNK = 1 << 16  # rows that are added at once
TRAINED = 40  # rows a list, of which the lists are made
MORE = 4  # candidates for each neighbour: the index knows them to one byte a number

Rows = NDArray[np.int64]


class NeighbourIndex:
    """An index of a store's rows; needs FAISS (extra ``faiss``).

    Args:
        store: The run's.
        probes: Lists that are searched; more find more, and take longer.

    Raises:
        ImportError: If FAISS is not installed.
    """

    def __init__(self, store: StoredVectors, probes: int = 32) -> None:
        self._faiss: Any = need("faiss", "InfluenceReport.neighbour_index", '"ine_callback[faiss]"')
        self._store, self._rows = store, np.flatnonzero(store.seen)
        count, metric = len(self._rows), self._faiss.METRIC_INNER_PRODUCT
        lists = min(4 * math.isqrt(count), max(1, count // TRAINED))
        kind = "Flat" if count <= EXACT else f"IVF{lists},SQ8"
        self._index = self._faiss.index_factory(store.dimensions, kind, metric)
        if count > EXACT:
            some = np.random.default_rng(0).choice(count, min(count, TRAINED * lists), replace=False)
            self._index.train(store.unit_rows(self._rows[np.sort(some)]))
            self._index.nprobe = probes
        for start in range(0, count, CHUNK):
            self._index.add(store.unit_rows(self._rows[start : start + CHUNK]))

    def neighbours(self, row: int, k: int = 10) -> Neighbours:
        """The k rows nearest to one, as :meth:`InfluenceReport.neighbours`.

        Raises:
            InfluenceError: If the row has no vector.
        """
        rows, cosines = self.nearest(np.array([checked(self._store, row)]), k)
        return Neighbours(row, rows[0], cosines[0])

    def nearest(self, which: Rows, k: int) -> tuple[Rows, Floats]:
        """The k rows nearest to each of some, and their cosines [n, k]; -1 and -inf where fewer were found."""
        k = min(k, len(self._rows) - 1)
        own = self._store.unit_rows(which)
        places = self._index.search(own, min(MORE * k + 1, len(self._rows)))[1]
        rows = np.where(places >= 0, self._rows[places], -1)
        vectors = self._store.unit_rows(rows.ravel()).reshape(*rows.shape, -1)
        cosines = np.einsum("nk,njk->nj", own, vectors).astype(np.float64)
        cosines[(rows < 0) | (rows == np.asarray(which)[:, None])] = -np.inf
        order = np.lexsort((rows, -cosines))[:, :k]
        rows, cosines = np.take_along_axis(rows, order, 1), np.take_along_axis(cosines, order, 1)
        return np.where(np.isfinite(cosines), rows, -1), cosines
