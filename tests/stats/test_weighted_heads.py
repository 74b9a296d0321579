"""Heads as functions of weights: scikit-learn's solution, copies of rows, derivatives by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ine_callback.stats.weighted_heads import least_squares, logistic

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=G, dtype=torch.float64)
NUMBERS = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(60, generator=G, dtype=torch.float64)
CODES = (NUMBERS > -1).long() + (NUMBERS > 1).long()
CLASSES = torch.eye(3, dtype=torch.float64)[CODES]
WEIGHTS = torch.rand(60, generator=G, dtype=torch.float64)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
HEADS: dict[str, Any] = {
    "numbers": lambda x, w: least_squares(x, NUMBERS[: len(x)], w, 0.02),
    "classes": lambda x, w: logistic(x, CLASSES[: len(x)], w, 0.02),
}


def objective(theta: Tensor, x: Tensor, w: Tensor, kind: str) -> Tensor:
    outputs = theta[0] + x @ theta[1:]
    if kind == "numbers":
        fit = w @ (NUMBERS - outputs[:, 0]).square() / 2
    else:
        fit = -w @ (outputs.log_softmax(1) * CLASSES).sum(1)
    return fit + 0.01 * theta.square().sum()


@pytest.mark.parametrize("kind", HEADS)
def test_it_is_the_minimum(kind: str) -> None:
    theta = HEADS[kind](X, WEIGHTS).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(theta, X, WEIGHTS, kind), theta)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", HEADS)
def test_its_derivatives_are_those_of_the_minimum(kind: str) -> None:
    def in_weights(w: Tensor) -> Tensor:
        return HEADS[kind](X, w)

    def in_features(x: Tensor) -> Tensor:
        return HEADS[kind](x, WEIGHTS)

    for function, point in ((in_weights, WEIGHTS), (in_features, X)):
        step = 1e-5 * torch.randn(point.shape, generator=G, dtype=torch.float64)
        _, found = torch.func.jvp(function, (point,), (step,))
        difference = (function(point + step) - function(point - step)) / 2
        assert (found - difference).abs().max() < 1e-7 * found.abs().max()


def test_a_start_changes_nothing() -> None:
    theta = logistic(X, CLASSES, WEIGHTS, 0.02)
    assert (logistic(X, CLASSES, WEIGHTS, 0.02, theta + 0.3) - theta).abs().max() < 1e-10


def test_separable_classes_have_a_minimum_too() -> None:
    theta = logistic(5 * X, torch.eye(2, dtype=X.dtype)[(X[:, 0] > 0).long()], WEIGHTS, 1e-4)
    assert torch.isfinite(theta).all() and theta.abs().max() < 100
