"""What a report answers by its gradient store."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.errors import InfluenceError
from ine_callback.report.alike import Alike, find
from ine_callback.report.neighbour_index import NeighbourIndex
from ine_callback.report.neighbours import WEAK, Neighbours, duplicate_cosine, near_duplicates, neighbours, weak_rows
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.report.weak_groups import RATE, WeakGroup, on_data, weak_groups
from ine_callback.scores import Attribution, Scores
from ine_callback.utilities.validate import threshold


class StoreQuestions:
    """Questions that need the store of :class:`~ine_callback.InfluenceReport`."""

    scores: Scores
    store: StoredVectors | None = None

    def ask(self, queries: Any, module: Any, **options: Any) -> Attribution:
        """Scores of all rows on queries that come after the run; see :func:`~ine_callback.ask`, which this calls.

        Args:
            queries: As for :class:`~ine_callback.InfluenceCallback`, with their data.
            module: The trained module.
            options: The others of :func:`~ine_callback.ask`.

        Raises:
            InfluenceError: If the run kept no store, or the module is another one.
        """
        import ine_callback  # asking needs torch, and what lies above a report

        report: Any = self  # an InfluenceReport, which this is a part of
        found: Attribution = ine_callback.ask(report, queries, module, **options)
        return found

    def neighbours(self, row: int, k: int = 10) -> Neighbours:
        """The rows that the run did the same with as with one, by the gradient store.

        Args:
            row: Dataset index.
            k: How many.

        Raises:
            InfluenceError: If the run kept no store, or the row was never observed.
        """
        return neighbours(self._stored("neighbours"), row, k)

    def neighbour_index(self, probes: int = 32) -> NeighbourIndex:
        """An index in memory that finds neighbours among millions of rows, many a second; needs the extra ``faiss``.

        Args:
            probes: Lists of rows that are searched; more find more, and take longer.

        Raises:
            InfluenceError: If the run kept no store. ImportError: If FAISS is not installed.
        """
        return NeighbourIndex(self._stored("neighbour_index"), probes)

    def near_duplicates(self, cosine: float | None = None) -> list[NDArray[np.int64]]:
        """Groups of rows that queries hardly tell apart, the largest first: chains of pairs of near duplicates.

        Args:
            cosine: Least cosine of a pair; by default far above that of this run's rows with their nearest ones
                (:func:`~ine_callback.report.neighbours.duplicate_cosine`).

        Raises:
            InfluenceError: If the run kept no store, or the cosine is none.
        """
        store = self._stored("near_duplicates")
        return near_duplicates(store, duplicate_cosine(store) if cosine is None else cosine)

    def weak_rows(self, share: float = WEAK) -> NDArray[np.int64]:
        """Rows that moved no query by much: vectors of at most this share of the median vector's length.

        Raises:
            InfluenceError: If the run kept no store.
        """
        return weak_rows(self._stored("weak_rows"), share)

    def weak_groups(self, q: float = RATE, query: str | None = None) -> list[WeakGroup]:
        """Groups of rows that move a query together, none of them flagged alone; those that raise it first.

        How they are found and tested: :mod:`ine_callback.report.weak_groups`.

        Args:
            q: Greatest false discovery rate over all groups and queries.
            query: Name of one query; by default all on data.

        Raises:
            InfluenceError: If the run kept no store. KeyError: When there is no such query.
        """
        report: Any = self
        columns = on_data(self.scores) if query is None else [report.column(query)]
        return weak_groups(
            self._stored("weak_groups"), self.scores, columns, threshold(q, "InfluenceReport.weak_groups")
        )

    @cached_property
    def alike(self) -> Alike | None:
        """Near duplicates and weak groups, found once for all views; None without a store or for very many rows."""
        return find(self.store, self.scores)

    def _stored(self, who: str) -> StoredVectors:
        if self.store is None:
            raise InfluenceError(f"{who}: the report has no gradient store; train with store=GradientStore().")
        return self.store
