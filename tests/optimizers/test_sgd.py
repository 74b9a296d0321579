"""SGD's rate against impulses and decays through the real optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from ine_callback.optimizers.registry import rate_of, step_rate


def run_out(make: Callable[[list[nn.Parameter]], Optimizer], impulse: float, steps: int = 400) -> float:
    """Where a parameter ends after a gradient of ``impulse`` at the fifth step and zeros otherwise."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([p])
    for t in range(steps):
        p.grad = torch.full_like(p, impulse if t == 4 else 0.0)
        optimizer.step()
    return p.item()


SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"momentum": 0.5, "maximize": True},
    "dampening-without-momentum": {"dampening": 0.5},
}


@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
def test_step_is_the_sum_of_a_gradients_effects_through_the_momentum_buffer(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(1))
    rate = rate_of(SGD([p], lr=0.3, **options), [p])
    assert rate.step == pytest.approx(-run_out(lambda ps: SGD(ps, lr=0.3, **options), 1.0), rel=1e-9)
    assert step_rate(SGD([p], lr=0.3, **options)) == rate.step
    assert rate.lr == 0.3
    assert rate.curvature == pytest.approx(abs(rate.step) / 0.3)


@pytest.mark.parametrize("options", [SGDS[k] for k in ("plain", "momentum", "dampening", "nesterov")])
def test_curvature_and_decay_are_the_rate_at_which_a_perturbation_fades(options: dict[str, Any]) -> None:
    """A quadratic of curvature h with weight decay: w ~ exp(-lr (h * curvature + decay) t) in the small-lr limit."""
    lr, h, weight_decay, steps = 1e-5, 2.0, 0.5, 4000
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([p], lr=lr, weight_decay=weight_decay, **options)
    rate = rate_of(optimizer, [p])
    for t in range(steps):
        if t == steps // 2:  # past the momentum buffer's own start
            half = p.item()
        p.grad = h * p.detach()
        optimizer.step()
    found = -math.log(p.item() / half) / (lr * steps / 2)
    assert found == pytest.approx(h * float(rate.curvature) + float(rate.decay), rel=5e-3)
