"""How often to train on each row next time, by its scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ine_callback.scores import Floats, Scores
from ine_callback.utilities.words import tails


def weights(scores: Scores, drop: NDArray[np.int64], column: int, strength: float) -> Floats:
    """See :meth:`InfluenceReport.weights`.

    Args:
        scores: Scores of all rows.
        drop: Rows that weigh 0 where ``strength`` is 0.
        column: Column of the query.
        strength: How much a score of root-mean-square size changes a weight.
    """
    if not 0.0 <= strength < np.inf:
        raise ValueError(f"InfluenceReport.weights: strength is {strength}; give a number >= 0, such as 0.5")
    out = np.ones(len(scores.observations))
    if strength == 0.0:
        out[drop] = 0.0
        return out
    mu = -tails(scores.queries[column].kind).suspect * scores.mu[:, column]
    seen = np.isfinite(mu)
    usual = float(np.sqrt(np.square(mu[seen]).mean())) if seen.any() else 0.0
    if usual > 0.0:
        out[seen] = np.clip(1.0 + strength * mu[seen] / usual, 0.0, 2.0)
    return out
