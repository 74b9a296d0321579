"""The spread of few repetitions: by hand, its limits, and that it is closer to the truth than what it is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar
from scipy.special import polygamma
from scipy.stats import gamma, norm

from ine_callback.stats.hypothesis_tests import fit_variance_prior
from ine_callback.stats.measured_spread import PRIOR, measured_spread


def common(scale: float, df: int) -> float:
    """The posterior mode by a search: a chi-square of the ratio, a normal prior of the logarithm."""
    sd = math.sqrt(float(polygamma(1, PRIOR / 2)))

    def loss(log: float) -> float:
        likelihood = gamma.logpdf(scale, df / 2, scale=2 * math.exp(log) / df)
        return -float(likelihood) - float(norm.logpdf(log, 0, sd))

    return math.exp(minimize_scalar(loss, bounds=(-20, 20), method="bounded", options={"xatol": 1e-10}).x)


def test_the_sd_of_an_accurate_prediction_is_the_prediction() -> None:
    values = np.array([[-1.0, 4.0], [1.0, 12.0]])
    np.testing.assert_allclose(measured_spread(values, values.std(0, ddof=1)), [math.sqrt(2), 4 * math.sqrt(2)])


@pytest.mark.parametrize(("runs", "queries"), [(2, 1), (2, 9), (5, 1), (5, 2)])
def test_two_values_or_few_quantities_take_the_stated_prior(runs: int, queries: int) -> None:
    random = np.random.default_rng(runs + queries)
    values, predicted = random.normal(0, 3, (runs, queries)), random.uniform(0.5, 2, queries)
    ratio, df = values.var(0, ddof=1) / predicted**2, runs - 1
    expected = (PRIOR * common(float(ratio.mean()), df) + df * ratio) / (PRIOR + df)
    np.testing.assert_allclose(measured_spread(values, predicted), predicted * np.sqrt(expected), rtol=1e-6)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_many_quantities_are_shrunk_as_limma_does(own: float) -> None:
    random = np.random.default_rng(2)
    sd, predicted = np.exp(own * random.standard_normal(40)), np.full(40, 3.0)
    values = random.standard_normal((6, 40)) * sd
    ratio = values.var(0, ddof=1) / 9
    d0, scale = fit_variance_prior(ratio, 5)
    assert math.isinf(d0) == (own == 0)
    middle = common(scale, 5)
    expected = np.full(40, middle) if math.isinf(d0) else (d0 * middle + 5 * ratio) / (d0 + 5)
    np.testing.assert_allclose(measured_spread(values, predicted), 3 * np.sqrt(expected), rtol=1e-6)


def test_a_measurement_of_many_values_replaces_the_prediction() -> None:
    values = np.random.default_rng(3).normal(0, 2, (4000, 1))
    assert measured_spread(values, np.array([30.0])) == pytest.approx(2, rel=0.05)


def test_values_that_are_equal_leave_a_spread_above_zero() -> None:
    for queries in (1, 5):
        found = measured_spread(np.ones((4, queries)), np.ones(queries))
        assert (found > 0).all() and (found < 1).all()
    one = np.array([[0.0, 1, 1, 1], [0.0, 2, 4, 3], [0.0, 5, 2, 1]])
    assert (measured_spread(one, np.ones(4)) > 0).all()
    assert measured_spread(np.empty((3, 0)), np.empty(0)).shape == (0,)


NUMBERS = st.floats(-10, 10, width=32)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 6), st.integers(1, 6), st.floats(1e-6, 1e6))
def test_the_unit_of_the_values_and_their_order_do_not_matter(data: st.DataObject, r: int, q: int, c: float) -> None:
    values = data.draw(arrays(np.float64, (r, q), elements=NUMBERS))
    predicted = data.draw(arrays(np.float64, q, elements=st.floats(0.125, 10, width=32)))
    found = measured_spread(values, predicted)
    assert (found > 0).all() and np.isfinite(found).all()
    np.testing.assert_allclose(measured_spread(c * values, c * predicted), c * found, rtol=1e-6)
    np.testing.assert_allclose(measured_spread(values[::-1] + 1, predicted), found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("together", [0.0, 0.8])
@pytest.mark.parametrize("queries", [1, 20])
def test_it_is_closer_than_the_prediction_and_than_the_plain_spread(runs: int, queries: int, together: float) -> None:
    """Root mean square error of the logarithm in 300 trials; half of the predictions' error is common to a trial.

    ``together``: correlation of the queries' losses over the runs.
    """
    random, errors = np.random.default_rng(4), np.zeros((300, 3))
    for trial in range(300):
        off = 0.5 * random.standard_normal() + 0.5 * random.standard_normal(queries)
        shared, alone = random.standard_normal((runs, 1)), random.standard_normal((runs, queries))
        losses = np.exp(off) * (math.sqrt(together) * shared + math.sqrt(1 - together) * alone)
        found = (np.ones(queries), losses.std(0, ddof=1), measured_spread(losses, np.ones(queries)))
        errors[trial] = [np.square(np.log(each) - off).mean() for each in found]
    predicted, plain, squeezed = np.sqrt(errors.mean(0))
    assert squeezed < predicted, (predicted, plain, squeezed)
    # limma's prior takes the losses as independent, and shrinks those of many runs that are not a little too much
    assert squeezed < plain * (1.1 if together and runs == 10 else 1.0), (predicted, plain, squeezed)


def test_predictions_that_are_all_far_off_are_corrected() -> None:
    """The trainings whose units are 12 times too large: five runs leave a factor below 3, of one query or of many."""
    random = np.random.default_rng(5)
    for queries in (1, 20):
        found = [measured_spread(random.standard_normal((5, queries)) / 12, np.ones(queries)) * 12 for _ in range(200)]
        assert 1 < np.exp(np.log(np.stack(found)).mean()) < 3
