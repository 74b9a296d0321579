"""Gaussian trade-off functions and estimators of mu from observations with and without a row.

A trade-off curve says how well two distributions can be told apart: ``beta = G_mu(alpha)`` is the smallest type-II
error of any test at type-I error ``alpha``. For N(0, 1) against N(mu, 1) it is ``Phi(Phi^-1(1 - alpha) - |mu|)`` (Dong,
Roth and Su, *Gaussian differential privacy*, arXiv 1905.02383). The curve has no sign; mu has one.

The estimators take ``o``, observations of steps that contain the row, and ``o_prime``, of steps that do not. An
observation is the step's decrease of the query, so ``mu > 0`` means that the row lowers the query (helpful).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]


def tradeoff(mu: ArrayLike, alpha: ArrayLike) -> Floats:
    """Returns the type-II error ``G_mu(alpha) = Phi(Phi^-1(1 - alpha) - |mu|)``, broadcast over both arguments.

    Distinguishability has no sign: ``mu`` and ``-mu`` have one curve.

    >>> tradeoff([0.0, -1.0, 1.0], 0.05).round(4).tolist()
    [0.95, 0.7405, 0.7405]
    """
    return np.asarray(special.ndtr(-special.ndtri(alpha) - np.abs(mu)), dtype=np.float64)


def mu_from_errors(alpha: ArrayLike, beta: ArrayLike) -> Floats:
    """Returns the signed ``mu = Phi^-1(1 - alpha) - Phi^-1(beta)`` of a test with error rates ``alpha`` and ``beta``.

    >>> mu_from_errors(0.05, tradeoff([0.5, 1.5], 0.05)).round(6).tolist()
    [0.5, 1.5]
    """
    return np.asarray(-special.ndtri(alpha) - special.ndtri(beta), dtype=np.float64)


def compose(mus: ArrayLike) -> float:
    """Returns ``sqrt(sum mu^2)``: the mu of a test that sees every step (unsigned); k equal steps give ``mu sqrt(k)``.

    >>> compose([0.5] * 4)
    1.0
    """
    return float(np.linalg.norm(np.asarray(mus, dtype=np.float64).ravel()))


def poisson_subsampling_mu(rate: float, steps: int, sigma: float) -> float:
    """Returns ``p sqrt(T (e^(1/sigma^2) - 1))``, the central-limit mu of noisy SGD with Poisson sampling.

    Args:
        rate: Probability p that a row enters a step.
        steps: Number T of steps.
        sigma: Noise multiplier: noise standard deviation in units of the clipping norm.

    >>> round(poisson_subsampling_mu(256 / 60_000, 15 * 60_000 // 256, 1.3), 3)
    0.227
    """
    return rate * math.sqrt(steps * math.expm1(1.0 / sigma**2))


def gaussian_mu(o: ArrayLike, o_prime: ArrayLike) -> float:
    """Returns the mean gap over the pooled standard deviation; unbiased to O(1/n). NaN with fewer than 3 observations.

    >>> round(gaussian_mu([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]), 6)
    1.0
    """
    x, y = _sample("o", o), _sample("o_prime", o_prime)
    freedom = x.size + y.size - 2
    if not x.size or not y.size or freedom < 1:
        return math.nan
    pooled = (((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()) / freedom
    return float((x.mean() - y.mean()) / math.sqrt(pooled)) if pooled > 0 else math.nan


def auc_mu(o: ArrayLike, o_prime: ArrayLike) -> float:
    """Returns ``sqrt(2) Phi^-1(AUC)``, ties counted half, the AUC clipped half a pair away from 0 and 1.

    >>> auc_mu([1.0, 2.0], [1.0, 2.0])
    0.0
    """
    return float(auc_mu_from_counts(*_tabulate(o, o_prime)))


def max_threshold_mu(o: ArrayLike, o_prime: ArrayLike) -> float:
    """Returns the signed mu_tau of largest magnitude over all thresholds tau (f-INE, arXiv 2510.10510, as published).

    ``alpha`` is the fraction of ``o_prime`` above tau and ``beta`` that of ``o`` at or below it, both clipped half a
    count of the smaller sample away from 0 and 1 (so one observation gives 0). **Biased**: the maximum grows with the
    noise. With 50 observations a side a true mu of 0 gives a mean magnitude of about 0.8, and a true mu of 1 gives
    about 1.55. Prefer `gaussian_mu` or `auc_mu`.

    >>> max_threshold_mu([5.0, 6.0], [1.0, 2.0]) > 0
    True
    """
    return float(max_threshold_mu_from_counts(*_tabulate(o, o_prime)))


def auc_mu_from_counts(o: ArrayLike, o_prime: ArrayLike) -> Floats:
    """Returns `auc_mu` of histograms [..., bins] over ascending bins; NaN where a side is empty.

    >>> float(auc_mu_from_counts([1, 1], [1, 1]))
    0.0
    """
    x, y = np.asarray(o, dtype=np.float64), np.asarray(o_prime, dtype=np.float64)
    pairs = x.sum(-1) * y.sum(-1)
    below = np.cumsum(y, axis=-1) - y / 2  # of o_prime, under the bin, ties half
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (x * below).sum(-1) / pairs
        half = 0.5 / pairs
        return np.asarray(math.sqrt(2.0) * special.ndtri(np.clip(auc, half, 1 - half)), dtype=np.float64)


def max_threshold_mu_from_counts(o: ArrayLike, o_prime: ArrayLike) -> Floats:
    """Returns `max_threshold_mu` of histograms [..., bins] over ascending bins; NaN where a side is empty.

    >>> abs(max_threshold_mu_from_counts([1, 1], [1, 1])).round(6).tolist()
    0.0
    """
    x, y = np.asarray(o, dtype=np.float64), np.asarray(o_prime, dtype=np.float64)
    size, size_prime = x.sum(-1, keepdims=True), y.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Half a count of the smaller sample on both sides: else unequal samples would score at empty thresholds.
        half = 0.5 / np.minimum(size, size_prime)
        beta = np.clip(np.cumsum(x, axis=-1) / size, half, 1 - half)
        alpha = np.clip(1 - np.cumsum(y, axis=-1) / size_prime, half, 1 - half)
        mus = mu_from_errors(alpha, beta)
        best = np.argmax(np.abs(mus), axis=-1, keepdims=True)
        return np.asarray(np.take_along_axis(mus, best, axis=-1)[..., 0], dtype=np.float64)


def _tabulate(o: ArrayLike, o_prime: ArrayLike) -> tuple[Floats, Floats]:
    """Returns both samples as counts over the sorted distinct values of their union."""
    x, y = _sample("o", o), _sample("o_prime", o_prime)
    values, place = np.unique(np.concatenate([x, y]), return_inverse=True)
    bins = max(values.size, 1)
    counts = [np.bincount(part, minlength=bins).astype(np.float64) for part in (place[: x.size], place[x.size :])]
    return counts[0], counts[1]


def _sample(name: str, values: ArrayLike) -> Floats:
    sample = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(sample).all():
        raise ValueError(f"tradeoff: {name} holds non-finite observations; leave them out first")
    return sample
