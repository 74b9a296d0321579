"""Logistic regression against scikit-learn's, and its optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ine_callback.stats.logistic import fit_logistic, probabilities


def test_it_is_scikit_learns_default() -> None:
    x, y = load_digits(return_X_y=True)
    x = x / 16
    weights, bias = fit_logistic(x[:300], y[:300], 10)
    other = LogisticRegression(max_iter=5000, tol=1e-10).fit(x[:300], y[:300])
    assert np.abs(probabilities(x[300:], weights, bias) - other.predict_proba(x[300:])).max() < 1e-5


def test_its_gradient_is_zero() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 3)) * 5 + 2, rng.integers(0, 4, 80)
    weights, bias = fit_logistic(x, y, 4)
    error = probabilities(x, weights, bias) - np.eye(4)[y]
    assert np.abs(x.T @ error + weights).max() < 1e-4 and np.abs(error.sum(0)).max() < 1e-4


@pytest.mark.filterwarnings("error")
def test_separable_and_single_classes_are_no_trouble() -> None:
    x = np.array([[-1e3], [1e3]])
    weights, bias = fit_logistic(x, np.array([0, 1]), 2)
    assert probabilities(x, weights, bias).argmax(1).tolist() == [0, 1]
    one = fit_logistic(x, np.array([0, 0]), 1)
    assert probabilities(x, *one).tolist() == [[1.0], [1.0]]
