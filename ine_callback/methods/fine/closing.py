"""f-INE's mu from a closing pass: the rows' shifts at the final weights, in units of training randomness.

    mu_i = s_i (K_i / mean K) / u,    u = UNIT sqrt(sd^2 + order)

with the shift s and the spread sd over initial weights of :mod:`ine_callback.methods.closing`, K the rows' numbers of
observations, and ``order`` the variance of the query's change over the draw of the batches, summed over the run. Both
are linear estimates, too large by about two on the half of the family of protocols that is for development, where UNIT
was chosen (docs/methods/fine-accuracy.md). Its standard error over training runs is

    se_i^2 = contrast_i^2 + RELATIVE (mu_i^2 + mean of mu^2)

with the mean square of the row's contrasts, shrunk to that of all rows. Contrasts know the initial weights alone; the
second part stands for the order of the rows and for what is not linear, and was chosen on the same half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ine_callback.methods.closing import Closing
from ine_callback.scores import Floats
from ine_callback.utilities.words import SIZE

UNIT, RELATIVE = 0.55, 0.1
PRIOR = 20  # contrasts that the mean over all rows counts as, beside a row's own
MAX_ORDER = 4.0  # times the spread over initial weights: beyond it early steps decide, which no linear estimate follows


def unit_of(closing: Closing, order: Floats) -> Floats:
    """A query's spread over trainings [Q]; NaN where nothing varies.

    Args:
        closing: The closing pass.
        order: Variance [Q] of the queries' changes over the draw of the batches.
    """
    unit = UNIT * np.sqrt(closing.sd**2 + order)
    return np.where(unit > 0, unit, np.nan)


def mu_of(closing: Closing, order: Floats, observations: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Scores and their standard errors [N, Q] over training runs; NaN for rows that the pass did not see."""
    visits = observations[: len(closing.shift)] / max(1e-12, float(observations[observations > 0].mean()))
    scale = visits[:, None] / unit_of(closing, order)
    mu, count = closing.shift * scale, closing.contrasts.shape[2]
    own = np.square(closing.contrasts * scale[..., None]).sum(2)
    spread = (PRIOR * _mean(own) / max(1, count) + own) / (PRIOR + count)
    return mu, np.sqrt(spread + RELATIVE * (mu**2 + _mean(mu**2)))


def _mean(values: Floats) -> Floats:
    """Mean over the rows that are known [1, Q]."""
    known = np.isfinite(values)
    sums: Floats = np.where(known, values, 0.0).sum(0, keepdims=True)
    means: Floats = sums / np.maximum(1, known.sum(0, keepdims=True))
    return means


def unreliable(closing: Closing, order: Floats) -> list[str]:
    """A sentence that says why the size of mu should not be believed; none where nothing speaks against it."""
    random = closing.sd > 0
    ratio = float(np.median(np.sqrt(order[random]) / closing.sd[random])) if random.any() else np.inf
    if ratio <= MAX_ORDER:
        return []
    why = f"the rows' order moves the queries {ratio:.1f} times as far as the initial weights (at most {MAX_ORDER:g})"
    why = why if random.any() else "the initial weights are fixed, and the order of the rows alone makes no unit"
    return [f"{SIZE}{why}; use mu to rank rows, not as a number of standard deviations"]
