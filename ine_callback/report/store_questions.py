"""What a report answers by its gradient store."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.errors import InfluenceError
from ine_callback.report.neighbours import DUPLICATE, WEAK, Neighbours, near_duplicates, neighbours, weak_rows
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Attribution


class StoreQuestions:
    """Questions that need the store of :class:`~ine_callback.InfluenceReport`."""

    store: StoredVectors | None

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

    def near_duplicates(self, cosine: float = DUPLICATE) -> list[NDArray[np.int64]]:
        """Groups of rows that no query tells apart, the largest first; see :mod:`ine_callback.report.neighbours`.

        Raises:
            InfluenceError: If the run kept no store, or the cosine is none.
        """
        return near_duplicates(self._stored("near_duplicates"), cosine)

    def weak_rows(self, share: float = WEAK) -> NDArray[np.int64]:
        """Rows that moved no query by much: vectors of at most this share of the median vector's length.

        Raises:
            InfluenceError: If the run kept no store.
        """
        return weak_rows(self._stored("weak_rows"), share)

    def _stored(self, who: str) -> StoredVectors:
        if self.store is None:
            raise InfluenceError(f"{who}: the report has no gradient store; train with store=GradientStore().")
        return self.store
