"""How often to train on each row next time, by what the report says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ine_callback.report.words import tails
from ine_callback.scores import Floats

if TYPE_CHECKING:
    from ine_callback.report.report import InfluenceReport


def weights(report: InfluenceReport, q: float = 0.05, query: str | None = None, strength: float = 0.0) -> Floats:
    """Weight of each row in the next training [N], for :class:`~ine_callback.InfluenceSampler` or a weighted loss.

    By default 0 for the rows of ``drop_list(q, query)`` and 1 for all others. With a ``strength`` every score counts
    and none is tested: ``1 + strength * z``, cut to 0 ... 2, where z is the score in units of its root mean square over
    the rows, positive at the end that is not the suspect one. Rows that were never observed weigh 1.

    Args:
        q: False discovery rate of the list.
        query: Name of the query; by default :attr:`~InfluenceReport.recommended_query`.
        strength: How much a score of usual size (root mean square) changes a weight; 0: the list alone.

    Raises:
        ValueError: On a strength that is no number of at least 0.

    Example:
        >>> from ine_callback.report import example_report
        >>> example_report().weights()[:5]
        array([1., 1., 1., 0., 1.])
        >>> example_report().weights(query="val margin", strength=0.5)[5:10].round(2)
        array([2.  , 1.03, 0.82, 1.09, 1.28])
    """
    if not 0.0 <= strength < np.inf:
        raise ValueError(f"InfluenceReport.weights: strength is {strength}; give a number >= 0, such as 0.5")
    out = np.ones(report.rows)
    if strength == 0.0:
        out[report.drop_list(q, query)] = 0.0
        return out
    column = report.column(report.recommended_query if query is None else query)
    mu = -tails(report.scores.queries[column].kind).suspect * report.scores.mu[:, column]
    seen = np.isfinite(mu)
    usual = float(np.sqrt(np.square(mu[seen]).mean())) if seen.any() else 0.0
    if usual > 0.0:
        out[seen] = np.clip(1.0 + strength * mu[seen] / usual, 0.0, 2.0)
    return out
