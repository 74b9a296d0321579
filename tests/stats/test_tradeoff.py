"""Trade-off functions: round trips, composition, a published constant, and estimators on samples of known mu."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ine_callback.stats import tradeoff as tr

MUS = st.floats(-4, 4)
ALPHAS = st.floats(0.001, 0.999)
SAMPLES = st.lists(st.integers(-5, 5), min_size=1, max_size=12)


@given(MUS, ALPHAS)
def test_round_trip_from_mu_to_error_rates_and_back(mu: float, alpha: float) -> None:
    beta = tr.tradeoff(mu, alpha)
    assert float(tr.mu_from_errors(alpha, beta)) == pytest.approx(abs(mu), abs=1e-6)
    assert float(tr.tradeoff(-mu, alpha)) == float(beta)


@given(MUS, ALPHAS)
def test_curve_is_its_own_inverse_and_below_guessing(mu: float, alpha: float) -> None:
    beta = float(tr.tradeoff(mu, alpha))
    assert beta <= 1 - alpha + 1e-12
    assert float(tr.tradeoff(mu, beta)) == pytest.approx(alpha, abs=1e-6)  # G_mu is symmetric


def test_error_rates_of_a_worked_threshold_give_signed_mu() -> None:
    # N(0, 1) against N(-1, 1) with threshold 0: half of the null lies above, Phi(1) of the other below.
    assert float(tr.mu_from_errors(0.5, 0.8413447460685429)) == pytest.approx(-1.0, abs=1e-12)


@given(MUS, st.integers(1, 200))
def test_k_equal_steps_compose_to_mu_root_k(mu: float, k: int) -> None:
    assert tr.compose([mu] * k) == pytest.approx(abs(mu) * math.sqrt(k), rel=1e-12)


def test_composition_is_a_likelihood_ratio_test_of_all_steps() -> None:
    mus = np.array([0.3, -0.4, 1.2])
    direction = mus / np.linalg.norm(mus)
    assert tr.compose(mus) == pytest.approx(float(mus @ direction), rel=1e-12)
    assert tr.compose([0.3, tr.compose([-0.4, 1.2])]) == pytest.approx(tr.compose(mus), rel=1e-12)


def test_poisson_subsampling_reproduces_the_published_constant() -> None:
    mu = tr.poisson_subsampling_mu(256 / 60_000, 15 * 60_000 // 256, 1.3)
    assert mu == pytest.approx(0.227, abs=5e-4)


@pytest.mark.parametrize("mu", [-1.0, 0.0, 1.0])
def test_gaussian_and_auc_estimators_are_unbiased(mu: float) -> None:
    # 600 repetitions of 50 a side: standard error of the mean .009; both have O(1/n) bias below .02 at mu = 1.
    g = np.random.default_rng(0)
    o, o_prime = mu + g.normal(size=(600, 50)), g.normal(size=(600, 50))
    for estimate in (tr.gaussian_mu, tr.auc_mu):
        mean = np.mean([estimate(x, y) for x, y in zip(o, o_prime, strict=True)])
        assert mean == pytest.approx(mu, abs=0.05)


@pytest.mark.parametrize(("mu", "published"), [(0.0, 0.79), (1.0, 1.55)])
def test_max_threshold_reproduces_its_known_bias(mu: float, published: float) -> None:
    # Standard error over 600 repetitions: .008 and .011; our own 3,000 gave .781 and 1.541.
    g = np.random.default_rng(1)
    found = [tr.max_threshold_mu(mu + g.normal(size=50), g.normal(size=50)) for _ in range(600)]
    assert np.abs(found).mean() == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("estimate", [tr.gaussian_mu, tr.auc_mu, tr.max_threshold_mu])
@given(SAMPLES, SAMPLES)
def test_swapping_the_samples_swaps_the_sign(estimate, o, o_prime) -> None:  # type: ignore[no-untyped-def]
    forward, backward = estimate(o, o_prime), estimate(o_prime, o)
    if estimate is tr.max_threshold_mu:  # two thresholds may tie in magnitude with opposite signs
        forward, backward = abs(forward), -abs(backward)
    assert forward == pytest.approx(-backward, abs=1e-9, nan_ok=True)


@given(SAMPLES, SAMPLES)
def test_auc_counts_pairs(o: list[int], o_prime: list[int]) -> None:
    wins = np.mean([(x > y) + (x == y) / 2 for x in o for y in o_prime])
    half = 0.5 / (len(o) * len(o_prime))
    expected = math.sqrt(2) * stats.norm.ppf(np.clip(wins, half, 1 - half))
    assert tr.auc_mu(o, o_prime) == pytest.approx(expected, abs=1e-9)


@given(SAMPLES, SAMPLES)
def test_max_threshold_searches_every_threshold(o: list[int], o_prime: list[int]) -> None:
    x, y = np.array(o), np.array(o_prime)
    half = 0.5 / min(len(x), len(y))
    rates = [((y > tau).mean(), (x <= tau).mean()) for tau in np.arange(-6.5, 6.5)]
    mus = [float(tr.mu_from_errors(*np.clip(pair, half, 1 - half))) for pair in rates]
    assert abs(tr.max_threshold_mu(o, o_prime)) == pytest.approx(max(map(abs, mus)), abs=1e-9)


def test_separated_samples_stay_finite_and_positive_for_helpful_rows() -> None:
    for estimate in (tr.auc_mu, tr.max_threshold_mu):
        assert 0 < estimate([5.0, 6.0, 7.0], [1.0, 2.0, 3.0]) < 10
        assert -10 < estimate([1.0, 1.0], [2.0] * 1000) < 0


def test_unequal_samples_do_not_score_at_empty_thresholds() -> None:
    assert tr.max_threshold_mu([0.0], [0.0] * 1000) == pytest.approx(0.0, abs=1e-12)


def test_empty_and_constant_samples_have_no_mu() -> None:
    assert math.isnan(tr.auc_mu([], [1.0])) and math.isnan(tr.max_threshold_mu([1.0], []))
    assert math.isnan(tr.gaussian_mu([1.0], [2.0])) and math.isnan(tr.gaussian_mu([1.0, 1.0], [2.0, 2.0]))
    with pytest.raises(ValueError, match="o_prime holds non-finite"):
        tr.auc_mu([1.0], [math.nan])


def test_area_under_the_curve_is_the_auc_of_binned_gaussians() -> None:
    area, _ = integrate.quad(lambda alpha: 1 - float(tr.tradeoff(1.3, alpha)), 0, 1)
    assert area == pytest.approx(stats.norm.cdf(1.3 / math.sqrt(2)), abs=1e-6)
    edges = np.linspace(-6, 8, 400)
    o, o_prime = 1e6 * np.diff(stats.norm.cdf(edges - 1.3)), 1e6 * np.diff(stats.norm.cdf(edges))
    assert float(tr.auc_mu_from_counts(o, o_prime)) == pytest.approx(1.3, abs=1e-3)
