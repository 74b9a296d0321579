"""f-INE's mu after a closing pass: the pass's shifts and the run's own, in units of training randomness.

The pass's mean shifts s (:mod:`ine_callback.methods.closing`) make scores of their own,

    c_i = s_i (K_i / mean K) / u,    u = UNIT sqrt(sd^2 + ORDER order / sum K + (FLOOR m)^2)

where sd is the spread of the query over initial weights, K the rows' numbers of observations, ``order / sum K`` the
variance that the order of the rows leaves, and m^2 the median of the first two over all queries: a query that one
run happens to have settled is not settled in all.

The run has seen the rows at all weights on the way, the pass sees them at a few, through a better curvature: their
errors differ. So mu is the sum of the run's scores and of the pass's ranking, each divided by its standard deviation
over rows, and ranks better than either. Its size is that of c, so mu u is a shift in the query's own unit.

    se_i^2 = errors of both over initial weights + RELATIVE (mu_i^2 + mean of mu^2)

The contrasts of single rows are shrunk to the mean of all. They know the initial weights alone; the last part stands
for the order of the rows and for what is not linear. These numbers were chosen on the development half of the family
of protocols and on trainings drawn for it (docs/methods/fine-accuracy.md).

From fixed weights mu is the pass's ranking in the run's size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ine_callback.methods.closing import Closing
from ine_callback.scores import Floats
from ine_callback.utilities.words import SIZE

UNIT, ORDER, FLOOR, RELATIVE = 0.46, 2.0, 0.3, 0.05
PRIOR = 20  # contrasts that the mean over all rows counts as, beside a row's own
LEAST_AGREEMENT = 0.75  # of the shifts at different late weights


class ClosedScores(NamedTuple):
    """Scores mu and their standard errors over training runs [N, Q], and what mu was divided by [Q]; NaN: unknown."""

    mu: Floats
    se: Floats
    unit: Floats


def unit_of(closing: Closing, observations: int) -> Floats:
    """A query's spread over trainings [Q]; NaN where nothing varies.

    Args:
        closing: The closing pass.
        observations: Of all rows together.
    """
    variance = closing.sd**2 + ORDER * closing.order / max(1, observations)
    known = variance[np.isfinite(variance)]  # a query may not be computable at the end
    unit: Floats = UNIT * np.sqrt(variance + FLOOR**2 * (np.median(known) if known.size else 0.0))
    return np.where(unit > 0, unit, np.nan)


def mu_of(closing: Closing, observations: NDArray[np.int64], run: Floats, run_se: Floats) -> ClosedScores:
    """The scores of a run and its closing pass.

    Args:
        closing: The closing pass, of the first N' <= N rows.
        observations: Of each row [N].
        run: The run's own mu [N, Q]; NaN for rows without.
        run_se: Its standard errors [N, Q].
    """
    shift, ranking, contrasts = (_of_rows(x, len(run)) for x in (closing.shift, closing.ranking, closing.contrasts))
    share = (observations / max(1e-12, float(observations[observations > 0].mean())))[:, None]
    random, unit = closing.sd.any(), unit_of(closing, int(observations.sum()))
    found, ranked, count = shift * share / (unit if random else 1.0), ranking * share, contrasts.shape[2]
    own = np.square(contrasts * share[..., None]).sum(2)
    error = np.sqrt((PRIOR * _mean(own) / max(1, count) + own) / (PRIOR + count))
    both = np.isfinite(ranked) & np.isfinite(run)
    spread, run_spread = (_spread(np.where(both, x, np.nan)) for x in (ranked, run))
    if not random:  # from fixed weights: the pass ranks better than the run, which has a size
        mu = ranked / spread * run_spread
        se = np.sqrt(run_se**2 + RELATIVE * (mu**2 + _mean(mu**2)))
        return ClosedScores(np.where(both, mu, run), se, np.full(len(unit), np.nan))
    total = ranked / spread + run / run_spread
    width = _spread(total)
    total = total / width
    size = _mean(found * total) / _mean(total**2)  # regression of c on the sum
    size = np.where(size > 0, size, _spread(np.where(both, found, np.nan)))
    mu = np.where(both, total, run / run_spread) * size  # rows that the pass did not see have the run's score alone
    errors = np.where(both, error / spread / width, 0.0), run_se / run_spread / np.where(both, width, 1.0)
    se = np.sqrt((errors[0] ** 2 + errors[1] ** 2) * size**2 + RELATIVE * (mu**2 + _mean(mu**2)))
    known = np.isfinite(size)  # a query that could not be computed at the end keeps the run's scores
    return ClosedScores(np.where(known, mu, run), np.where(known, se, run_se), np.where(known[0], unit, np.nan))


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


def unreliable(closing: Closing) -> list[str]:
    """A sentence that says why the size of mu should not be believed; none where nothing speaks against it."""
    if not closing.sd.any():
        why = "the initial weights are fixed, and the order of the rows alone makes no unit"
    elif closing.agreement < LEAST_AGREEMENT:
        why = f"what rows do at different late weights agrees in rank by {closing.agreement:.2f} only"
    else:
        return []
    return [f"{SIZE}{why}; use mu to rank rows, not as a number of standard deviations"]
