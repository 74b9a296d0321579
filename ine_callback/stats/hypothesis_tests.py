"""Tests of many rows at once: permutation p-values, moderated t, false discovery rate, and a check of uniformity.

NaN stands for "not observed" and passes through every function.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]


class VariancePrior(NamedTuple):
    """Scaled inverse chi-square prior of the rows' variances: ``d0`` degrees of freedom around ``s2``.

    ``d0 = inf``: all rows share one variance. ``d0 = 0``: too few rows to estimate it, variances are not shrunk.
    """

    d0: float
    s2: float


class ModeratedT(NamedTuple):
    """Moderated t [n], its two-sided p-value [n] and the moderated variances [n]."""

    t: Floats
    p: Floats
    variance: Floats


def permutation_p(x: ArrayLike, null: ArrayLike) -> Floats:
    """Returns two-sided p-values ``(1 + #{|null| >= |x|}) / (1 + #null)``, in the shape of ``x``.

    The ones count the observed arrangement itself among the permutations, so p is never 0 and the test is valid
    (Phipson and Smyth 2010, arXiv 1603.05766). Costs O((N + M) log M) for N statistics and M null draws.

    >>> permutation_p([0.5, -3.0], [1.0, -2.0, 0.1]).tolist()
    [0.75, 0.25]
    """
    statistic = np.abs(np.asarray(x, dtype=np.float64))
    draws = np.abs(np.asarray(null, dtype=np.float64).ravel())
    draws = np.sort(draws[~np.isnan(draws)])
    reached = draws.size - np.searchsorted(draws, statistic, side="left")
    return np.where(np.isnan(statistic), np.nan, (1.0 + reached) / (1.0 + draws.size))


def inverse_trigamma(x: float) -> float:
    """Returns y > 0 with ``trigamma(y) = x``, by Newton steps on the convex 1/trigamma (limma's iteration).

    >>> round(inverse_trigamma(float(special.polygamma(1, 2.5))), 10)
    2.5
    """
    if not x > 0:
        raise ValueError(f"inverse_trigamma: x = {x} must be positive")
    if x > 1e7:
        return 1.0 / math.sqrt(x)
    if x < 1e-6:
        return 1.0 / x
    y = 0.5 + 1.0 / x
    for _ in range(50):
        value = float(special.polygamma(1, y))
        step = value * (1.0 - value / x) / float(special.polygamma(2, y))
        y += step
        if abs(step) < 1e-10 * y:
            break
    return y


def fit_variance_prior(variance: ArrayLike, df: ArrayLike) -> VariancePrior:
    """Fits the prior of sample variances [n] with ``df`` degrees of freedom [n] by moments of their logarithms.

    limma's ``fitFDist`` (Smyth 2004, *Linear models and empirical Bayes methods*, section 6.2); entries with
    ``df < 1`` or a NaN variance are left out, zeros are raised to 1e-5 of the median.

    >>> fit_variance_prior([1.0, 1.0, 1.0], [4, 4, 4])
    VariancePrior(d0=inf, s2=1.0)
    """
    s2, nu = np.broadcast_arrays(np.asarray(variance, dtype=np.float64), np.asarray(df, dtype=np.float64))
    use = np.isfinite(s2) & (nu >= 1)
    s2, nu = s2[use], nu[use]
    if s2.size < 3 or not (s2 > 0).any():
        return VariancePrior(0.0, 1.0)
    middle = float(np.median(s2))
    s2 = np.maximum(s2, 1e-5 * (middle if middle > 0 else float(s2.mean())))
    each, which = np.unique(nu, return_inverse=True)  # many rows, but few different degrees of freedom
    e = np.log(s2) + (np.log(each / 2) - special.digamma(each / 2))[which]
    spread = float(e.var(ddof=1) - special.polygamma(1, each / 2)[which].mean())
    if spread <= 0:
        return VariancePrior(math.inf, float((nu * s2).sum() / nu.sum()))
    half = inverse_trigamma(spread)
    return VariancePrior(2 * half, math.exp(float(e.mean()) + float(special.digamma(half)) - math.log(half)))


def moderated_t(effect: ArrayLike, variance: ArrayLike, df: ArrayLike, unscaled: ArrayLike) -> ModeratedT:
    """Returns limma's moderated t, ``effect / sqrt(s~^2 unscaled)`` with ``s~^2 = (d0 s0^2 + df s^2) / (d0 + df)``.

    Degrees of freedom are ``d0 + df``, at most the sum of all ``df`` (as limma's ``eBayes``).

    Args:
        effect: Estimates [n].
        variance: Residual variance s^2 of one observation of each row [n].
        df: Residual degrees of freedom [n]; rows with ``df < 1`` get NaN.
        unscaled: Variance of the effect in units of sigma^2 [n], 1/K for a mean of K observations.

    >>> moderated_t([1.0, 2.0, 0.0], [1.0, 1.0, 1.0], [3, 3, 3], [0.25, 0.25, 0.25]).t.tolist()
    [2.0, 4.0, 0.0]
    """
    b, s2, nu, u = (np.asarray(a, dtype=np.float64) for a in (effect, variance, df, unscaled))
    d0, s2_0 = fit_variance_prior(s2, nu)
    usable = (nu >= 1) & np.isfinite(s2)
    safe = np.where(usable, nu, 1.0)
    shrunk = np.full(s2.shape, s2_0) if math.isinf(d0) else (d0 * s2_0 + safe * s2) / (d0 + safe)
    shrunk = np.where(usable, shrunk, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = b / np.sqrt(shrunk * u)
    freedom = np.minimum(d0 + safe, safe[usable].sum() if usable.any() else 1.0)
    return ModeratedT(t, 2 * np.asarray(special.stdtr(freedom, -np.abs(t)), dtype=np.float64), shrunk)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Returns q-values over the first axis of p-values [N] or [N, Q]; NaN entries do not count as tests and stay NaN.

    >>> benjamini_hochberg([0.01, float("nan"), 0.02]).round(6).tolist()
    [0.02, nan, 0.02]
    """
    values = np.asarray(p, dtype=np.float64)
    q = np.full(values.shape, np.nan)
    if not values.size:
        return q
    columns, target = values.reshape(len(values), -1), q.reshape(len(values), -1)
    for column, out in zip(columns.T, target.T, strict=True):
        tested = ~np.isnan(column)
        if tested.any():
            out[tested] = stats.false_discovery_control(column[tested], method="bh")
    return q


def uniformity_p(p: ArrayLike, null_size: int | None = None) -> float:
    """Returns the Kolmogorov-Smirnov p-value of "these p-values are uniform on (0, 1)"; NaN without a p-value.

    Args:
        p: p-values, any shape; NaN entries are left out.
        null_size: Number of null draws behind the p-values. A finite null adds its own sampling error, so the
            effective size is the two-sample ``n m / (n + m)``.

    >>> uniformity_p([0.125, 0.375, 0.625, 0.875]) > 0.99, uniformity_p([0.01] * 20) < 0.001
    (True, True)
    """
    values = np.asarray(p, dtype=np.float64).ravel()
    values = np.sort(values[~np.isnan(values)])
    n = values.size
    if n == 0:
        return math.nan
    grid = np.arange(n + 1) / n
    distance = max(float((grid[1:] - values).max()), float((values - grid[:-1]).max()))
    effective = n if null_size is None else max(1, round(n * null_size / (n + null_size)))
    return float(stats.kstwo.sf(distance, effective))
