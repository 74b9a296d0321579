r"""A quantity's standard deviation over few repetitions, where a prediction of it is known.

Of each of Q quantities, such as queries, there are R values and a predicted standard deviation u. With

    x = s^2 / u^2        measured variance over predicted one, R - 1 degrees of freedom
    m = scale of the x   over the quantities; how far off the predictions are together
    c = exp(W(a m e^a) - a),  a = (R - 1) / 2 psi'(PRIOR / 2)
    sd^2 = u^2 (d0 c + (R - 1) x) / (d0 + R - 1)

Each x is shrunk to what they have in common as limma does: m and its weight d0 are those of the quantities' prior
(:func:`ine_callback.stats.hypothesis_tests.fit_variance_prior`). Quantities of one model move together over its
trainings, so m is no better known than a single x, however many there are. So m is itself shrunk to 1: c is the
posterior mode under a normal prior of its logarithm, with the variance of a chi-square's with PRIOR degrees of freedom
(sd of the standard deviation's logarithm: .64, a factor of 1.9), given m with R - 1 degrees of freedom; W is Lambert's
function. Few quantities or two values tell nothing of d0, which then is PRIOR, and m the mean of the x.
"""

from __future__ import annotations

import numpy as np
from scipy.special import polygamma, wrightomega

from ine_callback.stats.hypothesis_tests import Floats, fit_variance_prior

PRIOR = 2.0  # degrees of freedom that a prediction counts as
FEW = 3  # quantities that a prior is estimated from, at least
TINY = 1e-12  # smallest ratio of variances that rounding errors leave


def measured_spread(values: Floats, predicted: Floats) -> Floats:
    """Standard deviations [Q] of repeated values; formula above.

    Args:
        values: R >= 2 repetitions [R, Q].
        predicted: Standard deviations [Q] > 0, in the unit of the values.

    Example:
        >>> values = np.array([[1.0], [3.0], [2.0], [6.0], [8.0]])  # sd 2.9
        >>> measured_spread(values, np.array([1.0])).round(2), measured_spread(values, np.array([2.9])).round(2)
        (array([2.74]), array([2.91]))
    """
    df = len(values) - 1
    ratio = np.maximum(np.square(values.std(0, ddof=1) / predicted), TINY)
    if not ratio.size:
        return np.zeros(0)
    d0, scale = fit_variance_prior(ratio, df) if df > 1 and len(ratio) >= FEW else (PRIOR, float(ratio.mean()))
    common = _shrunk(scale, df)
    if np.isinf(d0):
        return np.asarray(predicted * np.sqrt(common), dtype=np.float64)
    return np.asarray(predicted * np.sqrt((d0 * common + df * ratio) / (d0 + df)), dtype=np.float64)


def _shrunk(scale: float, df: int) -> float:
    """A ratio of variances with ``df`` degrees of freedom, shrunk to 1."""
    a = df / 2 * float(polygamma(1, PRIOR / 2))
    return float(np.exp(wrightomega(np.log(a * scale) + a) - a))  # W(e^x), without its overflow
