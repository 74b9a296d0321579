"""f-INE's mu after a closing pass: the pass's shifts and the run's own, in units of training randomness.

The pass's shifts s (:mod:`ine_callback.methods.closing`) make scores of their own,

    c_i = s_i (K_i / mean K) / u,    u = UNIT sqrt(sd^2 + order)

where sd is the spread of the query over initial weights, K the rows' numbers of observations, and ``order`` the
variance of the query's change over the draw of the batches, summed over the run. The run has seen the rows at all
weights on the way, the pass sees them at the last ones, through a better curvature: their errors differ. So mu is the
sum of both, each divided by its standard deviation over rows, and ranks better than either. Its size: each query's is
the geometric mean of the two, and all queries together have the size of c. So what mu was divided by is u times the
square root of (size of c / size of the run's mu, relative to the median query's): mu times that is the row's shift of
the query in the query's own unit, in the size of s.

    se_i^2 = errors of both over initial weights + RELATIVE (mu_i^2 + mean of mu^2)

The contrasts of single rows are shrunk to the mean of all. They know the initial weights alone; the last part stands
for the order of the rows and for what is not linear. UNIT and RELATIVE were chosen on the development half of the
family of protocols (docs/methods/fine-accuracy.md).

From fixed weights mu is the pass's ranking in the run's size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ine_callback.methods.closing import Closing
from ine_callback.scores import Floats
from ine_callback.utilities.words import SIZE

UNIT, RELATIVE = 0.42, 0.05
PRIOR = 20  # contrasts that the mean over all rows counts as, beside a row's own
MAX_ORDER = 4.0  # times the spread over initial weights: beyond it early steps decide, which no linear estimate follows


class ClosedScores(NamedTuple):
    """Scores mu and their standard errors over training runs [N, Q], and what mu was divided by [Q]; NaN: unknown."""

    mu: Floats
    se: Floats
    unit: Floats


def unit_of(closing: Closing, order: Floats) -> Floats:
    """A query's spread over trainings [Q]; NaN where nothing varies.

    Args:
        closing: The closing pass.
        order: Variance [Q] of the queries' changes over the draw of the batches.
    """
    unit = UNIT * np.sqrt(closing.sd**2 + order)
    return np.where(unit > 0, unit, np.nan)


def mu_of(
    closing: Closing, order: Floats, observations: NDArray[np.int64], run: Floats, run_se: Floats
) -> ClosedScores:
    """The scores of a run and its closing pass.

    Args:
        closing: The closing pass, of the first N' <= N rows.
        order: Variance [Q] of the queries' changes over the draw of the batches.
        observations: Of each row [N].
        run: The run's own mu [N, Q]; NaN for rows without.
        run_se: Its standard errors [N, Q].
    """
    shift, contrasts = (_of_rows(x, len(run)) for x in (closing.shift, closing.contrasts))
    predicted = unit_of(closing, order)
    scale = (observations / max(1e-12, float(observations[observations > 0].mean())))[:, None] / predicted
    found, count = shift * scale, contrasts.shape[2]
    own = np.square(contrasts * scale[..., None]).sum(2)
    error = np.sqrt((PRIOR * _mean(own) / max(1, count) + own) / (PRIOR + count))
    both = np.isfinite(found) & np.isfinite(run)
    spread, run_spread = (_spread(np.where(both, x, np.nan)) for x in (found, run))
    if not closing.sd.any():  # from fixed weights: the pass ranks better than the run, which has a size
        mu = found / spread * run_spread
        se = np.sqrt(run_se**2 + RELATIVE * (mu**2 + _mean(mu**2)))
        return ClosedScores(np.where(both, mu, run), se, np.full(len(predicted), np.nan))
    total = found / spread + run / run_spread
    width = _spread(total)
    total = total / width
    level = _mean(found * total) / _mean(total**2)
    level = np.where(level > 0, level, spread)
    ratio = level / run_spread
    size = np.sqrt(level * run_spread * np.median(ratio[np.isfinite(ratio)])) if np.isfinite(ratio).any() else ratio
    mu = np.where(both, total, run / run_spread) * size  # rows that the pass did not see have the run's score alone
    errors = np.where(both, error / spread / width, 0.0), run_se / run_spread / np.where(both, width, 1.0)
    se = np.sqrt((errors[0] ** 2 + errors[1] ** 2) * size**2 + RELATIVE * (mu**2 + _mean(mu**2)))
    known = np.isfinite(size)  # a query that could not be computed at the end keeps the run's scores
    unit = np.where(known, predicted * level / size, np.nan)[0]
    return ClosedScores(np.where(known, mu, run), np.where(known, se, run_se), unit)


def _of_rows(values: Floats, rows: int) -> Floats:
    """With NaN for the rows after the last."""
    missing = np.full((rows - len(values), *values.shape[1:]), np.nan)
    return np.concatenate([values, missing])


def _mean(values: Floats) -> Floats:
    """Mean over the rows that are known [1, Q]; NaN where there are none."""
    known = np.isfinite(values)
    count = known.sum(0, keepdims=True)
    means: Floats = np.where(known, values, 0.0).sum(0, keepdims=True) / np.where(count, count, np.nan)
    return means


def _spread(values: Floats) -> Floats:
    """Standard deviation over the rows that are known [1, Q]; NaN where nothing varies."""
    found = np.sqrt(_mean((values - _mean(values)) ** 2))
    return np.where(found > 0, found, np.nan)


def unreliable(closing: Closing, order: Floats) -> list[str]:
    """A sentence that says why the size of mu should not be believed; none where nothing speaks against it."""
    random = closing.sd > 0
    ratio = float(np.median(np.sqrt(order[random]) / closing.sd[random])) if random.any() else np.inf
    if ratio <= MAX_ORDER:
        return []
    why = f"the rows' order moves the queries {ratio:.1f} times as far as the initial weights (at most {MAX_ORDER:g})"
    why = why if random.any() else "the initial weights are fixed, and the order of the rows alone makes no unit"
    return [f"{SIZE}{why}; use mu to rank rows, not as a number of standard deviations"]
