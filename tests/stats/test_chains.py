"""Chain diagnostics on series whose answer is known, and the tests' p-values under their null."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.signal import lfilter

from ine_callback.stats.chains import drift, effective_size, fisher_z, minibatch_bias, paired_size, split_rhat
from ine_callback.stats.comoments import Comoments, Traces

RNG = np.random.default_rng(0)


def autoregression(rho: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Series along the last axis with autocorrelation rho^k and variance 1, from their stationary law."""
    noise = RNG.normal(size=shape) * math.sqrt(1 - rho**2)
    noise[..., 0] = RNG.normal(size=shape[:-1])
    return np.asarray(lfilter([1.0], [1.0, -rho], noise))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_size_of_an_autoregression(rho: float) -> None:
    sizes = [effective_size(autoregression(rho, (4, 2000))) for _ in range(20)]
    assert np.mean(sizes) == pytest.approx(8000 * (1 - rho) / (1 + rho), rel=0.12)


def test_split_rhat_detects_a_distant_chain_a_trend_and_a_spread() -> None:
    good = RNG.normal(size=(4, 400))
    assert split_rhat(good) < 1.02
    assert split_rhat(good + np.array([0, 0, 0, 2.0])[:, None]) > 1.2
    assert split_rhat(good + np.linspace(0, 3, 400)) > 1.2  # all chains alike, both halves differ
    assert split_rhat(np.where(np.arange(400) > 300, np.inf, good)) == math.inf
    assert math.isnan(split_rhat(good[:, :3])) and split_rhat(np.ones((2, 10))) == 1.0


def test_drift_is_the_correlation_with_the_draw_index() -> None:
    assert abs(drift(RNG.normal(size=(4, 500)))) < 0.2
    assert drift(RNG.normal(size=(4, 500)) - np.linspace(0, 9, 500)) < -0.9
    assert math.isnan(drift(np.ones((2, 9)))) and math.isnan(drift([[1.0, np.nan, 2.0]]))


def test_minibatch_bias_is_the_largest_eigenvalue() -> None:
    g = RNG.normal(size=(50, 7)) * np.arange(1, 8)
    covariance = np.cov(g.T, bias=True)
    expected = 0.02 / 4 * 9 * np.linalg.eigvalsh(covariance)[-1] / 10
    assert minibatch_bias(g, 0.02, 3.0, 10) == pytest.approx(expected)


@pytest.mark.parametrize(("one", "other"), [(0.0, 0.0), (0.8, 0.8), (0.9, 0.3)])
def test_fisher_z_is_uniform_under_the_null(one: float, other: float) -> None:
    """4 chains of 300 draws, 1,500 independent pairs; without the effective size it would reject far too often."""
    a, b = autoregression(one, (4, 1500, 300)), autoregression(other, (4, 1500, 300))
    traces = [Traces(300), Traces(300)]
    for series, trace in zip((a, b), traces, strict=True):
        for t in range(300):
            trace.update(torch.tensor(series[..., t]))
    r = np.array([[np.corrcoef(a[c, k], b[c, k])[0, 1] for k in range(1500)] for c in range(4)])
    size = paired_size(300, traces[0].autocorrelation().numpy(), traces[1].autocorrelation().numpy())
    assert stats.kstest(fisher_z(r, size), "uniform").pvalue > 0.01
    if one * other > 0.5:
        assert stats.kstest(fisher_z(r, 300), "uniform").pvalue < 1e-6


def test_fisher_z_detects_a_correlation_and_ignores_too_short_chains() -> None:
    assert float(fisher_z([0.3] * 4, 100)) < 1e-6
    assert float(fisher_z([0.3, 0.99], [100, 2])) == pytest.approx(float(fisher_z([0.3], [100])))
    assert np.isnan(fisher_z([0.5], [3]))


@pytest.mark.parametrize("sizes", [[7], [1, 1, 1, 1, 1, 1, 1], [3, 4], [1, 5, 1]])
def test_comoments_do_not_depend_on_the_blocks(sizes: list[int]) -> None:
    a, b = torch.randn(7, 2, 3, dtype=torch.float64) + 100, torch.randn(7, 2, 4, dtype=torch.float64)
    direct = torch.einsum("tcr,tcq->crq", a - a.mean(0), b - b.mean(0)) / 6
    moments, start = Comoments(), 0
    for size in sizes:
        moments.update(a[start : start + size], b[start : start + size])
        start += size
    assert moments.count == 7 and torch.allclose(moments.covariance(), direct, atol=1e-10)


def test_traces_equal_those_of_the_stored_series() -> None:
    x = torch.randn(50, 2, 3, dtype=torch.float64).cumsum(0) + 1000
    trace = Traces(50)
    for draw in x:
        trace.update(draw)
    centred = x - x.mean(0)
    assert torch.allclose(trace.mean(), x.mean(0)) and torch.allclose(trace.variance(), x.var(0))
    lag = (centred[1:] * centred[:-1]).sum(0) / centred.square().sum(0)
    assert torch.allclose(trace.autocorrelation(), lag, atol=1e-9)
    time = torch.arange(50, dtype=torch.float64)
    expected = ((time - time.mean())[:, None, None] * centred).sum(0) / 49 / time.std()
    assert torch.allclose(trace.trend(), expected)
