"""Regressions and classifiers that effects are estimated with: linear, spline, or any with scikit-learn's methods.

A nuisance is a function that the estimand needs and nobody asks for: E[Y | A, Z], P(A = 1 | Z), a ratio of densities.
The built-in ones are linear in a basis. Regressions choose their ridge penalty by generalised cross-validation
(Golub, Heath, Wahba 1979); classifiers are logistic with penalty ½ ‖w‖² on standardised columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.special import expit

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Function = Callable[[Floats], Floats]
KNOTS, DEGREE, FEW_VALUES = 4, 3, 6
RIDGES = np.logspace(-6, 2, 17)  # times the number of rows
NEWTON_STEPS, CONVERGED = 50, 1e-8
SMALLEST_PROBABILITY = 1e-3
LARGEST_EXPANSION = 40  # columns that are also multiplied pair by pair


class Regressor(Protocol):
    """What has scikit-learn's methods of a regressor."""

    def fit(self, x: Floats, y: Floats) -> Any: ...
    def predict(self, x: Floats) -> Floats: ...


class Classifier(Protocol):
    """What has scikit-learn's methods of a classifier of 0 and 1."""

    def fit(self, x: Floats, y: Floats) -> Any: ...
    def predict_proba(self, x: Floats) -> Floats: ...


class Basis:
    """Columns expanded: cubic splines where wanted, and products of pairs; standardised.

    Args:
        splines: Columns of more than 6 values become cubic splines with 4 inner knots, at quantiles; constant outside.
        products: Whether products of pairs of columns, and squares, are added.
    """

    def __init__(self, splines: bool, products: bool) -> None:
        self.splines, self.products = splines, products

    def fit(self, x: Floats) -> Floats:
        """Learns knots and scales of rows [n, d]; returns their expansion [n, k]."""
        self._mean, self._scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
        self._knots = [_knots(column) if self.splines else None for column in x.T]
        self._many = [len(np.unique(column)) > 2 for column in x.T]  # a square of two values is no new column
        expanded = self._expand(x)
        self._middle, deviation = expanded.mean(0), expanded.std(0)
        start = 0
        for knots in self._knots:  # splines where few rows are would hardly be penalised if each had its own scale
            width = 1 if knots is None else len(knots) - DEGREE - 2
            deviation[start : start + width] = np.sqrt((deviation[start : start + width] ** 2).mean())
            start += width
        self._deviation = np.where(deviation > 1e-12, deviation, 1.0)
        found: Floats = (expanded - self._middle) / self._deviation
        return found

    def __call__(self, x: Floats) -> Floats:
        found: Floats = (self._expand(x) - self._middle) / self._deviation
        return found

    def _expand(self, x: Floats) -> Floats:
        z = (x - self._mean) / self._scale
        parts = [z[:, [j]] if knots is None else _spline(x[:, j], knots) for j, knots in enumerate(self._knots)]
        width = z.shape[1]
        if self.products and 0 < width <= LARGEST_EXPANSION:
            pairs = [(i, j) for i in range(width) for j in range(i, width) if i != j or self._many[i]]
            parts += [(z[:, i] * z[:, j])[:, None] for i, j in pairs]
        return np.concatenate(parts, 1) if parts else np.zeros((len(x), 0))


class Ridge:
    """Least squares in a basis; the penalty is chosen by generalised cross-validation.

    Example:
        >>> x = np.linspace(-1, 1, 50)[:, None]
        >>> made = Ridge(Basis(splines=False, products=False)).fit(x, 2 * x[:, 0] + 1)
        >>> made.predict(np.array([[0.5]])).round(4)
        array([2.])
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def fit(self, x: Floats, y: Floats) -> Ridge:
        """Fits rows [n, d] to numbers [n]."""
        design, self._mean, n = self.basis.fit(x), y.mean(), len(y)
        self._weights = np.zeros(design.shape[1])
        if design.shape[1]:
            values, vectors = np.linalg.eigh(design.T @ design)
            values, target = values.clip(0), vectors.T @ (design.T @ (y - self._mean))
            total, best = float(((y - self._mean) ** 2).sum()), np.inf
            for ridge in n * RIDGES:
                shrunk = target / (values + ridge)
                rest = max(total - 2 * float(shrunk @ target) + float(values @ shrunk**2), 0.0)
                score = rest / (n - 1 - float((values / (values + ridge)).sum())) ** 2
                if score < best:
                    best, self._weights = score, vectors @ shrunk
        return self

    def predict(self, x: Floats) -> Floats:
        """Numbers [n] of rows [n, d]."""
        found: Floats = self.basis(x) @ self._weights + self._mean
        return found


class Logistic:
    """Logistic regression in a basis, by Newton's method; penalty ½ ‖w‖² without the intercept.

    Example:
        >>> x = np.repeat([[0.0], [1.0]], 500, 0)
        >>> y = np.r_[np.arange(500) < 100, np.arange(500) < 400].astype(float)
        >>> Logistic(Basis(splines=False, products=False)).fit(x, y).predict_proba(x[[0, 999]])[:, 1].round(2)
        array([0.2, 0.8])
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def fit(self, x: Floats, y: Floats) -> Logistic:
        """Fits rows [n, d] to classes 0 and 1 [n]."""
        design = np.c_[np.ones(len(y)), self.basis.fit(x)]
        penalty = np.r_[0.0, np.ones(design.shape[1] - 1)]
        w = np.zeros(design.shape[1])
        loss = _penalised(design, y, penalty, w)
        for _ in range(NEWTON_STEPS):
            p = expit(design @ w)
            gradient = design.T @ (p - y) + penalty * w
            curvature = (design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty + 1e-10)
            step, size = np.linalg.solve(curvature, gradient), 1.0
            while (new := _penalised(design, y, penalty, w - size * step)) > loss and size > 1e-6:
                size /= 2
            w, gained, loss = w - size * step, loss - new, new
            if gained < CONVERGED * (1 + abs(loss)):
                break
        self._weights = w
        return self

    def predict_proba(self, x: Floats) -> Floats:
        """Probabilities [n, 2] of rows [n, d]."""
        one = expit(self._weights[0] + self.basis(x) @ self._weights[1:])
        return np.stack([1 - one, one], 1)


class Nuisances(ABC):
    """What an effect is estimated with: for every fold a function of its own, fitted on chosen rows.

    Attributes:
        name: Shown in tables.
    """

    name: str

    @abstractmethod
    def means(self, x: Floats, y: Floats, rows: Mask) -> list[Function]:
        """Functions of rows [n, d] that are E[y | x].

        Args:
            x: Columns [N, d].
            y: Numbers [N], or others for each fold [K, N].
            rows: Which rows each of the K functions is fitted on [K, N].
        """

    @abstractmethod
    def probabilities(self, x: Floats, y: Mask, rows: Mask) -> list[Function]:
        """Functions of rows [n, d] that are P(y = 1 | x), within [.001, .999]; arguments as of :meth:`means`."""

    @abstractmethod
    def ratios(self, x: Floats, y: Mask, rows: Mask) -> list[Function]:
        """The same by a classifier that sees products of columns."""

    def odds(self, one: Floats, other: Floats, of_one: Mask, of_other: Mask) -> list[Function]:
        """Functions of rows [n, d] that are the density of some rows over that of others.

        Args:
            one: Rows [N, d].
            other: Rows [M, d].
            of_one: Which of them each of the K functions is fitted on [K, N].
            of_other: The same of the others [K, M].
        """
        which = np.r_[np.ones(len(one), dtype=bool), np.zeros(len(other), dtype=bool)]
        found = self.ratios(np.concatenate([one, other]), which, np.concatenate([of_one, of_other], 1))
        sizes = of_other.sum(1) / of_one.sum(1)
        return [_odds(function, float(size)) for function, size in zip(found, sizes, strict=True)]


@dataclass(frozen=True)
class FoldByFold(Nuisances):
    """Regressors and classifiers with scikit-learn's methods, fitted anew, as copies, for every fold.

    Attributes:
        regressor: For means.
        classifier: For probabilities.
        ratio: For ratios of densities: a classifier that sees products of columns.
        name: Shown in tables.
    """

    regressor: Regressor
    classifier: Classifier
    ratio: Classifier
    name: str = ""

    def means(self, x: Floats, y: Floats, rows: Mask) -> list[Function]:
        each = y if y.ndim == 2 else [y] * len(rows)
        return [_mean(self.regressor, x[mine], one[mine]) for mine, one in zip(rows, each, strict=True)]

    def probabilities(self, x: Floats, y: Mask, rows: Mask) -> list[Function]:
        return [_probability(self.classifier, x[mine], y[mine]) for mine in rows]

    def ratios(self, x: Floats, y: Mask, rows: Mask) -> list[Function]:
        return [_probability(self.ratio, x[mine], y[mine]) for mine in rows]


def limited(probability: Floats) -> Floats:
    """Within [.001, .999], so that no single row gets all the weight."""
    found: Floats = probability.clip(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return found


def _mean(regressor: Regressor, x: Floats, y: Floats) -> Function:
    model = deepcopy(regressor)
    model.fit(_filled(x), y)
    return lambda new: np.asarray(model.predict(_filled(new)), dtype=np.float64)


def _probability(classifier: Classifier, x: Floats, y: Mask) -> Function:
    model = deepcopy(classifier)
    model.fit(_filled(x), y.astype(np.float64))
    return lambda new: limited(np.asarray(model.predict_proba(_filled(new)), dtype=np.float64)[:, 1])


def _odds(probability: Function, sizes: float) -> Function:
    return lambda new: (p := probability(new)) / (1 - p) * sizes


def _filled(x: Floats) -> Floats:
    """A constant column where there is none: scikit-learn refuses rows without columns."""
    return x if x.shape[1] else np.zeros((len(x), 1))


def _knots(column: Floats) -> Floats | None:
    values = np.unique(column)
    if len(values) <= FEW_VALUES:
        return None
    inner = np.unique(np.quantile(column, np.linspace(0, 1, KNOTS + 2)[1:-1]))
    inner = inner[(inner > values[0]) & (inner < values[-1])]
    found: Floats = np.r_[[values[0]] * (DEGREE + 1), inner, [values[-1]] * (DEGREE + 1)]
    return found


def _spline(column: Floats, knots: Floats) -> Floats:
    """All but the first of the splines, which add up to 1."""
    inside = column.clip(knots[0], knots[-1])
    found: Floats = BSpline.design_matrix(inside, knots, DEGREE).toarray()[:, 1:]
    return found


def _penalised(design: Floats, y: Floats, penalty: Floats, w: Floats) -> float:
    z = design @ w
    return float(np.logaddexp(0, z).sum() - y @ z + 0.5 * (penalty * w**2).sum())
