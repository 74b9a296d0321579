"""Rows to look at, and perhaps drop: by a tested score, or by their mean loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ine_callback.scores import Scores
from ine_callback.utilities.validate import threshold
from ine_callback.utilities.words import NO_QUERY, tails

Rows = NDArray[np.int64]


def recommended(scores: Scores) -> str:
    """See :attr:`InfluenceReport.recommended_query`.

    Raises:
        KeyError: Where f-INE scored no query.
    """
    if not scores.queries:
        raise KeyError(f"InfluenceReport: {NO_QUERY}")
    for kind in ("self", "margin"):
        for query in scores.queries:
            if query.kind == kind:
                return query.name
    return scores.queries[0].name


def suspects(scores: Scores, q: float, column: int, who: str) -> Rows:
    """See :meth:`InfluenceReport.drop_list`."""
    mu = scores.mu[:, column] * tails(scores.queries[column].kind).suspect
    rows = np.flatnonzero((scores.q[:, column] <= threshold(q, who)) & (mu > 0))
    return rows[np.argsort(-mu[rows], kind="stable")]


def by_loss(scores: Scores, k: int | None) -> Rows:
    """See :meth:`InfluenceReport.suspect_labels`."""
    loss = scores.mean_loss
    rows = np.flatnonzero(np.isfinite(loss))
    if not len(rows):
        raise ValueError(
            "InfluenceReport.suspect_labels: the run knew no losses of single rows; use drop_list() of a 'self' or "
            "margin query, or train with a standard torch loss"
        )
    return rows[np.argsort(-loss[rows], kind="stable")][:k]
