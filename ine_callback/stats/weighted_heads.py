"""Linear heads on given features, as functions of the rows' weights with exact derivatives.

    minimise  Σᵢ wᵢ loss(yᵢ, θᵀ(1, xᵢ)) + ½ λ ‖θ‖²

for the squared error (halved) or the cross entropy; with features of mean 0 the penalty hardly touches the bias. The
derivative is that of the implicit function theorem: at the minimum one more Newton step, its Hessian held fixed, moves
nothing and has the minimum's derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ine_callback.errors import InfluenceError

ITERATIONS, ENOUGH = 100, 1e-12  # Newton steps at most, and the gradient at which they end


def least_squares(x: Tensor, y: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Coefficients [1 + p, 1] for numbers y [n].

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        >>> weights = torch.full((3,), 1 / 3, dtype=torch.float64)
        >>> least_squares(x, 1 + 2 * x[:, 0], weights, 1e-9)[:, 0].round(decimals=4)
        tensor([1., 2.], dtype=torch.float64)
    """
    wide = _wide(x)
    gram = (wide * weights[:, None]).T @ wide + ridge * torch.eye(wide.shape[1], dtype=x.dtype)
    found: Tensor = torch.linalg.solve(gram, wide.T @ (weights * y)[:, None])
    return found


def logistic(x: Tensor, classes: Tensor, weights: Tensor, ridge: float, start: Tensor | None = None) -> Tensor:
    """Coefficients [1 + p, C] of a multinomial logistic regression.

    Args:
        x: Features [n, p].
        classes: One-hot [n, C].
        weights: Of the rows [n], with sum 1.
        ridge: λ > 0, which also makes the C columns' common part 0.
        start: Coefficients near the minimum, where some are known.

    Raises:
        InfluenceError: If Newton's method does not converge.

    Example:
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
        >>> theta = logistic(x, torch.eye(2, dtype=x.dtype)[[0, 0, 1, 1]], torch.full_like(x[:, 0], 0.25), 1e-2)
        >>> theta.sum(1).abs().max() < 1e-12, (theta[0] + 3 * theta[1]).softmax(0)[1] > 0.99
        (tensor(True), tensor(True))
    """
    wide, count = _wide(x), classes.shape[1]
    fixed, theta = wide.detach(), _minimum(wide.detach(), classes, weights.detach(), ridge, start)
    gradient = _gradient(wide, classes, weights, theta, ridge)
    hessian = _hessian(fixed, weights.detach(), (fixed @ theta).softmax(1), ridge)
    step: Tensor = torch.linalg.solve(hessian, gradient.T.reshape(-1)).reshape(count, -1).T
    return theta - step


def _minimum(wide: Tensor, classes: Tensor, weights: Tensor, ridge: float, start: Tensor | None) -> Tensor:
    """Newton's method; each step is halved until the objective falls."""

    def objective(theta: Tensor) -> Tensor:
        fit = -(weights @ ((wide @ theta).log_softmax(1) * classes).sum(1))
        return fit + ridge / 2 * theta.square().sum()

    theta = wide.new_zeros(wide.shape[1], classes.shape[1]) if start is None else start
    value = objective(theta)
    for _ in range(ITERATIONS):
        gradient = _gradient(wide, classes, weights, theta, ridge)
        if float(gradient.abs().max()) < ENOUGH:
            return theta
        hessian = _hessian(wide, weights, (wide @ theta).softmax(1), ridge)
        step = torch.linalg.solve(hessian, gradient.T.reshape(-1)).reshape(theta.shape[1], -1).T
        scale = 1.0
        while scale > 1e-6 and objective(theta - scale * step) > value + 1e-14:
            scale /= 2
        theta = theta - scale * step
        value = objective(theta)
    raise InfluenceError("logistic: no minimum in 100 Newton steps; raise ridge, or take fewer features.")


def _gradient(wide: Tensor, classes: Tensor, weights: Tensor, theta: Tensor, ridge: float) -> Tensor:
    return wide.T @ (weights[:, None] * ((wide @ theta).softmax(1) - classes)) + ridge * theta


def _hessian(wide: Tensor, weights: Tensor, p: Tensor, ridge: float) -> Tensor:
    """[C (1 + p), C (1 + p)], the classes outermost."""
    count, size = p.shape[1], wide.shape[1]
    found = ridge * torch.eye(count * size, dtype=wide.dtype)
    for a in range(count):
        for b in range(a, count):
            factor = weights * p[:, a] * (float(a == b) - p[:, b])
            block = (wide * factor[:, None]).T @ wide
            found[a * size : (a + 1) * size, b * size : (b + 1) * size] += block
            if a != b:
                found[b * size : (b + 1) * size, a * size : (a + 1) * size] += block
    return found


def _wide(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[:, :1]), x], 1)
