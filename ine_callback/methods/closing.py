r"""What a closing pass finds: each row's shift of every query at late weights, in the query's own unit.

Let g_i be a row's gradient, v a query's and F the Fisher, all at the same weights, and R the learning rate that the
run summed up, times what the optimizer makes of it. Training on the row instead of leaving it out lowers the query by

    s_i = (R / N) <(1 + R F)^-1 v, g_i>,

an influence function whose damping 1/R is no free number: it is what R of gradient descent leaves undamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ine_callback.scores import Floats
from ine_callback.stats.ranks import spearman


@dataclass(frozen=True)
class Closing:
    """What a closing pass found.

    Attributes:
        shift: Shifts s [N, Q] of the queries on data; NaN for rows that the pass did not see.
        contrasts: The same with Rademacher signs on each layer's units [N, Q, J].
        sd: Standard deviation [Q] that random initial weights leave in the query at the end; 0 where they are fixed.
        order: ``<v, R (1 - (1 + R F)^-1) v>`` [Q]. Divided by twice the number of rows that the run's steps had, it is
            the variance that steps of gradient descent on random batches settle at, where their gradients' covariance
            is F (Mandt et al. 2017, arXiv 1704.04289).
        losses: The queries' values [Q] at the final weights, of which their gradients were taken.
        agreement: Mean Spearman correlation of the shifts at different weights; NaN where there was one pass alone.
    """

    shift: Floats
    contrasts: Floats
    sd: Floats
    order: Floats
    losses: Floats
    agreement: float = float("nan")


def averaged(passes: Sequence[Closing]) -> Closing:
    """Mean shifts and variances of passes at different weights, the final ones first.

    Example:
        >>> one, other = (Closing(np.array([[1.0], [s]]), np.zeros((2, 1, 1)), *np.full((3, 1), s)) for s in (2.0, 3.0))
        >>> both = averaged([one, other])
        >>> both.shift[:, 0], both.order, round(both.agreement, 3)
        (array([1. , 2.5]), array([2.5]), 1.0)
    """
    shifts = np.stack([one.shift for one in passes])
    return Closing(
        shifts.mean(0),
        np.mean([one.contrasts for one in passes], 0),
        np.sqrt(np.mean(np.square([one.sd for one in passes]), 0)),
        np.mean([one.order for one in passes], 0),
        passes[0].losses,
        _agreement(shifts),
    )


def _agreement(shifts: Floats) -> float:
    """Mean Spearman correlation over queries and pairs of passes [K, N, Q]; NaN for one pass."""
    known = shifts[:, np.isfinite(shifts).all((0, 2))]
    if len(shifts) < 2 or known.shape[1] < 2:
        return float("nan")
    queries = range(shifts.shape[2])
    found = [spearman(one[:, q], other[:, q]) for one, other in combinations(known, 2) for q in queries]
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
