"""Diagnostics of Markov chains: split R-hat, effective sample size, drift, minibatch bias; tests of a correlation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]


def split_rhat(chains: ArrayLike) -> float:
    """Returns the potential scale reduction of half chains [C, T]: near 1 when all halves see one distribution.

    Gelman et al., *Bayesian Data Analysis*, 3rd ed., section 11.4. NaN with fewer than 4 draws, infinite where a value
    is not finite.

    >>> rng = np.random.default_rng(0)
    >>> (
    ...     split_rhat(rng.normal(size=(4, 500))) < 1.01,
    ...     split_rhat(rng.normal(size=(4, 500)) + np.arange(4)[:, None]) > 1.5,
    ... )
    (True, True)
    """
    x = np.asarray(chains, dtype=np.float64)
    half = x.shape[1] // 2
    if half < 2:
        return math.nan
    if not np.isfinite(x).all():
        return math.inf
    parts = np.concatenate([x[:, :half], x[:, -half:]])
    within = float(parts.var(1, ddof=1).mean())
    between = float(parts.mean(1).var(ddof=1))
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((half - 1) / half + between / within)


def effective_size(chains: ArrayLike) -> float:
    """Returns the effective number of draws of all chains [C, T] together, by Geyer's initial positive sequence.

    C T / (1 + 2 Σ ρ_k), autocorrelations averaged over the chains and summed in pairs while the pairs are positive
    (Geyer 1992, *Practical Markov chain Monte Carlo*). At most C T, also for anticorrelated draws.

    >>> rng = np.random.default_rng(0)
    >>> 3000 < effective_size(rng.normal(size=(4, 1000))) <= 4000
    True
    """
    x = np.asarray(chains, dtype=np.float64)
    count, draws = x.shape
    if draws < 4 or not np.isfinite(x).all():
        return math.nan
    x = x - x.mean(1, keepdims=True)
    spectrum = np.abs(np.fft.rfft(x, 2 * draws, axis=1)) ** 2
    covariance = np.fft.irfft(spectrum, axis=1)[:, :draws].mean(0)
    if covariance[0] <= 0:
        return float(count * draws)
    rho = covariance / covariance[0]
    pairs = rho[: draws // 2 * 2].reshape(-1, 2).sum(1)
    stop = int(np.argmax(pairs <= 0)) if bool((pairs <= 0).any()) else len(pairs)
    time = max(1.0, 2 * float(np.minimum.accumulate(pairs[:stop]).sum()) - 1)
    return float(count * draws / time)


def drift(chains: ArrayLike) -> float:
    """Returns the correlation of the chains' average [C, T] with the draw index; NaN where something is not finite.

    >>> round(drift([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]), 6)
    1.0
    """
    x = np.asarray(chains, dtype=np.float64).mean(0)
    if len(x) < 3 or not np.isfinite(x).all() or x.std() == 0:
        return math.nan
    return float(np.corrcoef(x, np.arange(len(x)))[0, 1])


def minibatch_bias(gradients: ArrayLike, step_size: float, n_beta: float, batch_size: int) -> float:
    """Returns by how much minibatch noise inflates the posterior's variance in the worst direction.

    (ε/4) n_beta² ‖Σ‖ / m, with Σ the covariance of the rows' gradients: minibatch noise adds to the injected noise,
    which has variance ε. 0.1 means that the chain's variance is 10 % too large there.

    Args:
        gradients: What each row adds to a minibatch gradient, in the chain's coordinates [n, P].
        step_size: ε.
        n_beta: Weight of the mean loss.
        batch_size: Rows of a minibatch.

    >>> minibatch_bias([[1.0, 0.0], [-1.0, 0.0]], step_size=0.4, n_beta=1.0, batch_size=2)
    0.05
    """
    g = np.asarray(gradients, dtype=np.float64)
    if len(g) < 2:
        return math.nan
    g = g - g.mean(0)
    return float(step_size / 4 * n_beta**2 * np.linalg.eigvalsh(g @ g.T / len(g))[-1] / batch_size)


def paired_size(draws: int, one: ArrayLike, other: ArrayLike) -> Floats:
    """Returns the effective sample size of the correlation of two autocorrelated series.

    n (1 − ρ₁ρ₂) / (1 + ρ₁ρ₂) for first-order autoregressions (Bartlett 1935), at most n.

    Args:
        draws: n.
        one: Lag-1 autocorrelation of the one series.
        other: That of the other; the two are broadcast.

    >>> float(paired_size(100, 0.5, 0.5))
    60.0
    """
    product = np.clip(np.asarray(one, dtype=np.float64) * np.asarray(other, dtype=np.float64), 0, 0.9999)
    return np.asarray(draws * (1 - product) / (1 + product), dtype=np.float64)


def fisher_z(correlation: ArrayLike, size: ArrayLike) -> Floats:
    """Returns two-sided p-values of "no correlation", from independent chains along the first axis.

    Each chain's atanh(r) has variance 1/(n − 3) (Fisher 1921) with the effective size for n; the chains' mean weighted
    by n − 3 is compared with the normal. Chains with n <= 3 have no weight.

    Args:
        correlation: Correlation in each chain [C, ...].
        size: Effective sample size of each chain, broadcast to the same.

    >>> fisher_z([[0.0], [0.0]], [[50], [50]]).tolist(), float(fisher_z([0.5, 0.5], 100)) < 1e-9
    ([1.0], True)
    """
    r, n = np.broadcast_arrays(np.asarray(correlation, dtype=np.float64), np.asarray(size, dtype=np.float64))
    weight = np.maximum(n - 3, 0)
    total = (weight * np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = total / np.sqrt(weight.sum(0))
    return np.asarray(2 * special.ndtr(-np.abs(z)), dtype=np.float64)
