r"""What a closing pass finds: each row's shift of every query at weights along the run, in the query's own unit.

Let g_i be a row's gradient, v a query's and F the Fisher, all at the same weights, and R the learning rate that the
run summed up, times what the optimizer makes of it. Training on the row instead of leaving it out lowers the query by

    s_i = (R / N) <(1 + R F)^-1 v, g_i>,

an influence function whose damping 1/R is no free number: it is what R of gradient descent leaves undamped.

Shifts at several weights are averaged for their size. For the ranking of rows each is divided by its standard deviation
over the rows first: where losses have vanished, ``(1 + R F)^-1`` has nothing to damp and makes a few rows' shifts huge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ine_callback.scores import Floats
from ine_callback.stats.ranks import spearman


@dataclass(frozen=True)
class OnePass:
    """What the pass at one time's weights found.

    Attributes:
        shift: Shifts s [N, Q] of the queries on data; NaN for rows that the pass did not see.
        contrasts: The same with Rademacher signs on each layer's units [N, Q, J].
        sd: Standard deviation [Q] that random initial weights leave in the query; 0 where they are fixed.
        order: ``<v, R (1 - (1 + R F)^-1) v>`` [Q].
    """

    shift: Floats
    contrasts: Floats
    sd: Floats
    order: Floats


@dataclass(frozen=True)
class Closing:
    """What a closing pass found.

    Attributes:
        shift: Mean shift [N, Q] of the queries on data; NaN for rows that the pass did not see.
        ranking: Mean [N, Q] of the shifts divided by their standard deviations over the rows.
        contrasts: The same of the shifts with Rademacher signs on each layer's units [N, Q, J].
        sd: Standard deviation [Q] that random initial weights leave in the query; 0 where they are fixed.
        order: ``<v, R (1 - (1 + R F)^-1) v>`` [Q]. Divided by twice the number of rows that the run's steps had, it is
            the variance that steps of gradient descent on random batches settle at, where their gradients' covariance
            is F (Mandt et al. 2017, arXiv 1704.04289).
        losses: The queries' values [Q] at the final weights.
        agreement: Mean Spearman correlation of the shifts at different weights; NaN where there was one pass alone.
    """

    shift: Floats
    ranking: Floats
    contrasts: Floats
    sd: Floats
    order: Floats
    losses: Floats
    agreement: float = float("nan")


def averaged(passes: Sequence[OnePass], losses: Floats) -> Closing:
    """Mean shifts, rankings and variances of passes at different weights.

    Args:
        passes: At least one.
        losses: The queries' values [Q] at the final weights.

    Example:
        >>> one, other = (OnePass(np.array([[1.0], [s]]), np.zeros((2, 1, 1)), *np.full((2, 1), s)) for s in (2.0, 3.0))
        >>> both = averaged([one, other], np.zeros(1))
        >>> both.shift[:, 0], both.ranking[:, 0], both.order, round(both.agreement, 3)
        (array([1. , 2.5]), array([1.5, 3.5]), array([2.5]), 1.0)
    """
    shifts = np.stack([one.shift for one in passes])
    spreads = _spread(shifts)
    return Closing(
        shifts.mean(0),
        (shifts / spreads).mean(0),
        np.mean([one.contrasts / spread[..., None] for one, spread in zip(passes, spreads, strict=True)], 0),
        np.sqrt(np.mean(np.square([one.sd for one in passes]), 0)),
        np.mean([one.order for one in passes], 0),
        losses,
        _agreement(shifts),
    )


def _spread(shifts: Floats) -> Floats:
    """Standard deviations [K, 1, Q] over the rows that a pass saw; NaN where nothing varies."""
    known = np.isfinite(shifts)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    mean = np.where(known, shifts, 0.0).sum(1, keepdims=True) / count
    found = np.sqrt(np.where(known, (shifts - mean) ** 2, 0.0).sum(1, keepdims=True) / count)
    return np.where(found > 0, found, np.nan)


def _agreement(shifts: Floats) -> float:
    """Mean Spearman correlation over queries and pairs of passes [K, N, Q]; NaN for one pass."""
    known = shifts[:, np.isfinite(shifts).all((0, 2))]
    if len(shifts) < 2 or known.shape[1] < 2:
        return float("nan")
    queries = range(shifts.shape[2])
    found = [spearman(one[:, q], other[:, q]) for one, other in combinations(known, 2) for q in queries]
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
