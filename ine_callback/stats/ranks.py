"""Agreement of two rankings."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def spearman(one: Floats, other: Floats) -> float:
    """Returns Spearman's correlation of two series of numbers; NaN where either has fewer than two different ones.

    >>> spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3]))
    1.0
    """
    from scipy.stats import spearmanr  # slow to import, which reading a report need not wait for

    if min(np.unique(one).size, np.unique(other).size) < 2:
        return math.nan
    return float(spearmanr(one, other).statistic)
