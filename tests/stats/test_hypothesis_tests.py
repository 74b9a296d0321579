"""Tests of many rows: counted permutation p-values, limma's moderated t, false discovery rate, uniformity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from ine_callback.stats import hypothesis_tests as ht

NUMBERS = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=20)


@given(NUMBERS, NUMBERS)
def test_permutation_p_counts_draws_at_least_as_extreme(x: list[float], null: list[float]) -> None:
    expected = [(1 + sum(abs(n) >= abs(v) for n in null)) / (1 + len(null)) for v in x]
    assert ht.permutation_p(x, null).tolist() == pytest.approx(expected, abs=1e-15)


def test_permutation_p_keeps_shape_and_ignores_nan() -> None:
    p = ht.permutation_p([[1.0, math.nan]], [[math.nan, 0.5], [2.0, -1.0]])
    assert p.shape == (1, 2)
    assert p[0, 0] == 0.75 and math.isnan(p[0, 1])


@given(st.floats(-12, 12))
def test_inverse_trigamma_inverts(log_x: float) -> None:
    x = math.exp(log_x)
    assert float(special.polygamma(1, ht.inverse_trigamma(x))) == pytest.approx(x, rel=1e-6)


def test_inverse_trigamma_names_a_bad_argument() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ht.inverse_trigamma(0.0)


def test_variance_prior_recovers_its_parameters() -> None:
    # limma's model: s^2 ~ s0^2 F(df, d0). 20,000 rows: relative error of d0 about 3 %.
    g = np.random.default_rng(0)
    df = g.integers(1, 9, size=20_000)
    prior = 5.0 * g.chisquare(df) / df / (g.chisquare(6.0, size=df.size) / 6.0)
    fit = ht.fit_variance_prior(prior, df)
    assert fit.d0 == pytest.approx(6.0, rel=0.1)
    assert fit.s2 == pytest.approx(5.0, rel=0.05)


def test_variance_prior_pools_rows_of_one_variance() -> None:
    g = np.random.default_rng(1)
    df = g.integers(2, 9, size=500)
    s2 = 3.0 * g.chisquare(df) / df
    fit = ht.fit_variance_prior(np.minimum(s2, 4.0), df)  # cut tails: less spread than chi-square
    assert fit.d0 == math.inf
    assert fit.s2 == pytest.approx(float((df * np.minimum(s2, 4.0)).sum() / df.sum()), rel=1e-12)


def test_moderated_t_equals_a_reference_written_out() -> None:
    g = np.random.default_rng(2)
    k, n = 4, 60
    y = g.normal(size=(n, k)) * np.sqrt(1 / g.gamma(2.0, size=(n, 1)))
    s2, df = y.var(1, ddof=1), k - 1
    e = np.log(s2) - special.digamma(df / 2) + math.log(df / 2)
    target = e.var(ddof=1) - float(special.polygamma(1, df / 2))
    low, high = 1e-3, 1e3  # bisection instead of Newton
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if special.polygamma(1, middle) > target else (low, middle)
    d0, s0 = 2 * low, math.exp(e.mean() + special.digamma(low) - math.log(low))
    shrunk = (d0 * s0 + df * s2) / (d0 + df)
    t = y.mean(1) / np.sqrt(shrunk / k)
    fit = ht.moderated_t(y.mean(1), s2, np.full(n, df), np.full(n, 1 / k))
    np.testing.assert_allclose(fit.t, t, rtol=1e-8)
    np.testing.assert_allclose(fit.variance, shrunk, rtol=1e-8)
    np.testing.assert_allclose(fit.p, 2 * stats.t.sf(np.abs(t), d0 + df), rtol=1e-6)


def test_moderated_t_without_enough_rows_is_the_ordinary_t() -> None:
    y = np.array([1.0, 2.0, 4.0])
    expected = stats.ttest_1samp(y, 0.0)
    fit = ht.moderated_t([y.mean()], [y.var(ddof=1)], [2], [1 / 3])
    assert fit.t[0] == pytest.approx(expected.statistic) and fit.p[0] == pytest.approx(expected.pvalue)


def test_moderated_t_is_nan_for_rows_without_residual() -> None:
    fit = ht.moderated_t([1.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, math.nan], [3, 3, 3, 0], [0.25] * 4)
    assert np.isfinite(fit.p[:3]).all() and np.isnan([fit.t[3], fit.p[3], fit.variance[3]]).all()


def test_moderated_t_is_calibrated_where_the_model_holds() -> None:
    # 4,000 rows: standard error of the rejection rate at 5 % is .0034.
    g = np.random.default_rng(3)
    k = g.integers(2, 7, size=4000)
    sigma2 = 8.0 / g.chisquare(8.0, size=k.size)
    mean, s2 = g.normal(size=k.size) * np.sqrt(sigma2 / k), sigma2 * g.chisquare(k - 1) / (k - 1)
    p = ht.moderated_t(mean, s2, k - 1, 1 / k).p
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.012)
    assert ht.uniformity_p(p) > 0.01


def test_benjamini_hochberg_skips_what_was_not_tested() -> None:
    p = np.array([[0.01, math.nan], [math.nan, 0.5], [0.04, 0.02], [0.03, math.nan]])
    q = ht.benjamini_hochberg(p)
    np.testing.assert_allclose(q, [[0.03, math.nan], [math.nan, 0.5], [0.04, 0.04], [0.04, math.nan]])
    assert np.isnan(ht.benjamini_hochberg([math.nan, math.nan])).all()
    assert ht.benjamini_hochberg(np.empty((0, 2))).shape == (0, 2)


def test_uniformity_agrees_with_scipy_and_knows_a_finite_null() -> None:
    p = np.random.default_rng(4).random(200) ** 1.2
    assert ht.uniformity_p(np.append(p, math.nan)) == pytest.approx(stats.kstest(p, "uniform").pvalue, rel=1e-9)
    assert ht.uniformity_p(p, null_size=200) > ht.uniformity_p(p)
    assert math.isnan(ht.uniformity_p([math.nan]))
