"""Stochastic descent to the solution, which ASTRA and LiSSA share: a stable step, and the mean of the last half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.influence.solvers.base import Solution, System

CHECK_EVERY = 10
MAX_HALVINGS = 8


def descend(
    system: System,
    v: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    iterations: int,
    step: float | None,
    momentum: float,
    tol: float,
    name: str,
) -> Solution:
    """Minimises ``x (F + D) x / 2 - v x`` over minibatches from ``start``; returns the mean of the last half.

    The step is at most the inverse of the largest eigenvalue, measured on minibatches. Where the objective on a fixed
    check batch rises, the step is halved and the last good point restored.

    Raises:
        InfluenceError: Where even a step halved eight times diverges: with the eigenvalue.
    """
    largest = system.largest_eigenvalue(precondition)
    rate = min(step or 1.0, 1 / largest if largest > 0 else 1.0) * (1 - momentum)
    check = system.minibatch()
    x, velocity, best, best_value = (
        start.clone(),
        torch.zeros_like(v),
        start.clone(),
        _objective(system, start, v, check),
    )
    tail, count, halvings = torch.zeros_like(v), 0, 0
    for k in system.progress(range(iterations), name):
        r = system.product(x, *system.minibatch(), draw=k + 1) - v
        velocity = momentum * velocity + precondition(r)
        x = x - rate * velocity
        if k >= iterations // 2:
            tail, count = tail + x, count + 1
        if (k + 1) % CHECK_EVERY == 0:
            value = _objective(system, x, v, check)
            if bool((value <= best_value + tol * best_value.abs()).all()):
                best, best_value = x.clone(), value
                continue
            if not bool(x.isfinite().all()) or bool((value > best_value + 0.5 * best_value.abs()).any()):
                halvings += 1
                if halvings > MAX_HALVINGS:
                    raise InfluenceError(
                        f"IF: solver='{name}' diverges: the largest eigenvalue seen is {largest:.3g}, and a step of "
                        f"{rate:.3g} is still too long; raise damping or batch_size."
                    )
                x, velocity, rate = best.clone(), torch.zeros_like(v), rate / 2
                tail, count = torch.zeros_like(v), 0
    found = tail / count if count else x
    return Solution(found, system.residual(found, v), iterations, largest)


def _objective(system: System, x: Tensor, v: Tensor, check: tuple[Tensor, Tensor]) -> Tensor:
    """The objective of each query [Q]."""
    return ((system.product(x, *check) / 2 - v) * x).sum(1)
