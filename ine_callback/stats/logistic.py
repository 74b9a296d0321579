"""Multinomial logistic regression, for a few hundred rows on a host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def fit_logistic(x: Floats, y: NDArray[np.int64], classes: int) -> tuple[Floats, Floats]:
    """Weights [d, C] and biases [C] that minimise Σ −log p(yᵢ | xᵢ) + ½ ‖W‖², the biases free.

    The penalty is that of scikit-learn's LogisticRegression with its default C=1, for three or more classes. The
    problem is convex; L-BFGS from 0.

    Args:
        x: Features [n, d].
        y: Classes 0 to C − 1 [n].
        classes: C.

    Example:
        >>> weights, bias = fit_logistic(np.array([[0.0], [1.0], [4.0], [5.0]]), np.array([0, 0, 1, 1]), 2)
        >>> probabilities(np.array([[2.5]]), weights, bias).round(3)
        array([[0.5, 0.5]])
    """
    from scipy.optimize import minimize  # slow to import

    n, d = x.shape
    wide = np.concatenate([x, np.ones((n, 1))], 1)
    penalized = np.concatenate([np.ones((d, classes)), np.zeros((1, classes))])

    def objective(flat: Floats) -> tuple[float, Floats]:
        theta = flat.reshape(d + 1, classes)
        p = probabilities(x, theta[:-1], theta[-1])
        loss = -np.log(np.maximum(p[np.arange(n), y], np.finfo(float).tiny)).sum()
        p[np.arange(n), y] -= 1
        held = penalized * theta
        return float(loss + (held * theta).sum() / 2), (wide.T @ p + held).ravel()

    found = minimize(
        objective, np.zeros((d + 1) * classes), jac=True, method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 4000, "gtol": 1e-6, "ftol": 1e-14},
    ).x.reshape(d + 1, classes)  # fmt: skip
    return found[:-1], found[-1]


def probabilities(x: Floats, weights: Floats, bias: Floats) -> Floats:
    """Probabilities [n, C] of the classes."""
    from scipy.special import softmax

    return np.asarray(softmax(x @ weights + bias, axis=1), dtype=np.float64)
