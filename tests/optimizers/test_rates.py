"""Optimizer rates against impulses through the real optimizers, planned learning rates against real runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs

from ine_callback.optimizers.rates import Schedule, known, plan, rate_of, same_rate, step_rate

STEPS = 24


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
def test_step_is_the_sum_of_a_gradients_effects(options: dict[str, Any]) -> None:
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


def test_parameter_groups_have_their_own_rates() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = SGD([{"params": [a]}, {"params": [b], "lr": 0.5, "momentum": 0.5}], lr=0.1)
    assert rate_of(optimizer, [a]).step == 0.1
    assert rate_of(optimizer, [b]).step == pytest.approx(1.0)
    assert rate_of(optimizer, [c]).step == 0.0
    assert not same_rate(optimizer, a, b) and not same_rate(optimizer, a, c) and same_rate(optimizer, a, a)


# Adam's coupled weight decay enters its average: see the next test
@pytest.mark.parametrize(("kind", "steps"), [(AdamW, 0), (AdamW, 1), (AdamW, 7), (Adam, 0)])
def test_adam_has_one_scalar_a_block(kind: type[Optimizer], steps: int) -> None:
    """1 / (rms of the bias-corrected root of v + eps), from an average kept by hand."""
    weight, bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
    optimizer = kind([weight, bias], lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    v = [torch.zeros(3, 2), torch.zeros(3)]
    for _ in range(steps):
        for k, p in enumerate((weight, bias)):
            p.grad = torch.randn_like(p)
            v[k] = 0.9 * v[k] + 0.1 * p.grad.square()
        optimizer.step()
    if steps:
        flat = torch.cat([x.flatten() for x in v]) / (1 - 0.9**steps)
    else:  # before the first step the present gradient stands in
        weight.grad, bias.grad = torch.randn(3, 2), torch.randn(3)
        flat = torch.cat([weight.grad.flatten(), bias.grad]).square()
    scale = 1 / (flat.mean().sqrt() + 1e-3)
    rate = rate_of(optimizer, [weight, bias])
    torch.testing.assert_close(torch.as_tensor(rate.curvature), scale, rtol=1e-5, atol=0)
    assert rate.step == rate.lr == 0.01
    expected = 0.2 * scale if kind is Adam else torch.tensor(0.2)
    torch.testing.assert_close(torch.as_tensor(rate.decay), expected, rtol=1e-5, atol=0)


def test_adam_with_coupled_decay_reads_the_optimizers_own_average() -> None:
    p = nn.Parameter(torch.randn(4))
    optimizer = Adam([p], lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    v = torch.zeros(4)
    for _ in range(5):
        p.grad = torch.randn(4)
        v = 0.9 * v + 0.1 * (p.grad + 0.2 * p.detach()).square()
        optimizer.step()
    scale = 1 / ((v / (1 - 0.9**5)).mean().sqrt() + 1e-8)
    torch.testing.assert_close(rate_of(optimizer, [p]).curvature, scale, rtol=1e-5, atol=0)


def test_adam_without_any_gradient_has_no_curvature() -> None:
    p = nn.Parameter(torch.zeros(2))
    assert rate_of(Adam([p]), [p]).curvature == 0.0


def test_known_optimizers() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    assert known(SGD(p)) and known(Adam(p)) and known(AdamW(p))
    other = torch.optim.RMSprop(p, lr=0.2, momentum=0.9, weight_decay=0.1)
    assert not known(other)
    assert rate_of(other, p).step == 0.2 and rate_of(other, p).curvature == 1.0  # taken as plain SGD


# -- plans -------------------------------------------------------------------------------------------------------------

Make = Callable[[Optimizer], list[tuple[Any, int]]]


def _warm_up_then_cosine(optimizer: Optimizer) -> list[tuple[Any, int]]:
    warm = lrs.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    return [(lrs.SequentialLR(optimizer, [warm, lrs.CosineAnnealingLR(optimizer, STEPS - 6)], milestones=[6]), 1)]


SCHEDULES: dict[str, Make] = {
    "none": lambda o: [],
    "lambda": lambda o: [(lrs.LambdaLR(o, lambda t: 1 / (1 + t)), 1)],
    "lambda-a-group": lambda o: [(lrs.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1.0]), 1)],
    "step": lambda o: [(lrs.StepLR(o, 5, gamma=0.3), 1)],
    "step-each-epoch": lambda o: [(lrs.StepLR(o, 2, gamma=0.5), 6)],
    "multi-step": lambda o: [(lrs.MultiStepLR(o, [3, 11]), 1)],
    "exponential": lambda o: [(lrs.ExponentialLR(o, 0.9), 4)],
    "cosine": lambda o: [(lrs.CosineAnnealingLR(o, STEPS), 1)],
    "cosine-each-epoch": lambda o: [(lrs.CosineAnnealingLR(o, 4), 6)],
    "restarts": lambda o: [(lrs.CosineAnnealingWarmRestarts(o, 7), 1)],
    "one-cycle": lambda o: [(lrs.OneCycleLR(o, 0.5, total_steps=STEPS), 1)],
    "warm-up-cosine": _warm_up_then_cosine,
    "two-at-once": lambda o: [(lrs.ExponentialLR(o, 0.95), 1), (lrs.StepLR(o, 3, gamma=0.5), 4)],
    "chained": lambda o: [(lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.StepLR(o, 4)]), 1)],
    "cyclic": lambda o: [(lrs.CyclicLR(o, 0.01, 0.2, step_size_up=4), 1)],
}


def make_optimizer(kind: type[Optimizer] = SGD) -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.02}]
    return kind(groups, lr=0.1, momentum=0.9) if kind is SGD else kind(groups, lr=0.1)


def real_rates(optimizer: Optimizer, schedulers: list[tuple[Any, int]], steps: int = STEPS) -> list[float]:
    found = []
    for t in range(1, steps + 1):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        for scheduler, every in schedulers:
            if t % every == 0:
                scheduler.step()
    return found


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call")
def test_plan_equals_the_real_run(make: Make, kind: type[Optimizer]) -> None:
    optimizer = make_optimizer(kind)
    schedulers = make(optimizer)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    states = [copy.deepcopy(s.state_dict()) for s, _ in schedulers]
    step = optimizer.step
    schedule = plan(optimizer, STEPS, schedulers)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert [_comparable(s.state_dict()) for s, _ in schedulers] == [_comparable(s) for s in states]
    assert optimizer.step == step and not optimizer.state
    planned = real_rates(optimizer, schedulers)
    assert schedule.planned == pytest.approx(planned, rel=1e-12)
    assert schedule.note == ""


def _comparable(state: Any) -> Any:
    """Scheduler states hold schedulers and functions; keep the numbers."""
    if isinstance(state, dict):
        return {k: _comparable(v) for k, v in state.items() if not callable(v)}
    if isinstance(state, list | tuple):
        return [_comparable(v) for v in state]
    return state if isinstance(state, int | float | str | bool) else None


def test_plan_in_the_middle_of_a_run() -> None:
    optimizer = make_optimizer()
    schedulers = SCHEDULES["cosine"](optimizer)
    real_rates(optimizer, schedulers, 10)
    schedule = plan(optimizer, STEPS - 10, schedulers)
    assert schedule.planned == pytest.approx(real_rates(optimizer, schedulers, STEPS - 10), rel=1e-12)


def test_a_plateau_scheduler_is_taken_as_constant_and_said() -> None:
    optimizer = make_optimizer()
    scheduler = lrs.ReduceLROnPlateau(optimizer, patience=0)
    schedule = plan(optimizer, 5, [(scheduler, 1)])
    assert schedule.planned == (0.1,) * 5
    assert scheduler.num_bad_epochs == 0
    for steps in (3, 2):  # also where early stopping has something to say
        for _ in range(steps):
            schedule.advance(0.1)
        assert "plateau" in schedule.summary()["note"]


def test_a_scheduler_past_its_end_keeps_its_last_rate() -> None:
    optimizer = make_optimizer()
    schedulers = [(lrs.OneCycleLR(optimizer, 0.5, total_steps=6), 1)]
    schedule = plan(optimizer, 10, schedulers)
    real = real_rates(optimizer, schedulers, 6)
    assert schedule.planned == pytest.approx([*real, *[optimizer.param_groups[0]["lr"]] * 4])
    with pytest.raises(ValueError, match="total"):
        schedulers[0][0].step()


def test_a_scheduler_that_cannot_be_copied_is_said() -> None:
    class Odd(lrs.LRScheduler):
        def get_lr(self) -> list[float]:
            return [0.1, 0.1]

        def __deepcopy__(self, memo: dict[int, Any]) -> Odd:
            raise TypeError("not this one")

    optimizer = make_optimizer()
    schedule = plan(optimizer, 4, [(Odd(optimizer), 1)])
    assert schedule.planned == (0.1,) * 4
    assert "TypeError: not this one" in schedule.note


def test_a_scheduler_that_knows_the_module_does_not_copy_it() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def factor(self, t: int) -> float:
            return 0.5**t

        def __deepcopy__(self, memo: dict[int, Any]) -> Module:
            pytest.fail("the module was copied")

    module = Module()
    optimizer = SGD(module.parameters(), lr=1.0)
    schedule = plan(optimizer, 4, [(lrs.LambdaLR(optimizer, module.factor), 1)], keep=[module])
    assert schedule.planned == (1.0, 0.5, 0.25, 0.125)


# -- what remains ------------------------------------------------------------------------------------------------------


def test_remaining_is_the_sum_of_what_comes_after_the_coming_step() -> None:
    planned = [0.4, 0.3, 0.2, 0.1]
    schedule = Schedule(planned)
    for t, lr in enumerate(planned):
        assert schedule.remaining(lr) == pytest.approx(sum(planned[t + 1 :]))
        schedule.advance(lr)
    assert schedule.remaining(0.1) == 0.0
    assert schedule.summary() == {
        "planned_steps": 4,
        "steps": 4,
        "planned_lr_sum": pytest.approx(1.0),
        "realised_lr_sum": pytest.approx(1.0),
        "note": "",
    }


def test_a_rate_that_left_the_plan_rescales_the_rest() -> None:
    schedule = Schedule([0.1] * 10)
    schedule.advance(0.1)
    assert schedule.remaining(0.05) == pytest.approx(8 * 0.05)


def test_a_planned_rate_of_zero_is_not_divided_by() -> None:
    schedule = Schedule([0.0, 0.1, 0.1])
    assert schedule.remaining(0.0) == pytest.approx(0.2)


def test_training_longer_than_planned_leaves_nothing() -> None:
    schedule = Schedule([0.1] * 2)
    for _ in range(5):
        schedule.advance(0.1)
    assert schedule.remaining(0.1) == 0.0


def test_unknown_horizon_is_as_long_as_the_past() -> None:
    for steps in (0, -1, math.inf):
        schedule = plan(make_optimizer(), steps)
        assert schedule.planned == ()
    assert schedule.remaining(0.1) == 0.0
    for lr in (0.1, 0.2):
        schedule.advance(lr)
    assert schedule.remaining(0.2) == pytest.approx(0.3)
    assert "unknown horizon" in schedule.summary()["note"]


def test_early_stop_is_told() -> None:
    schedule = Schedule([0.1] * 10)
    for _ in range(4):
        schedule.advance(0.1)
    summary = schedule.summary()
    assert (summary["steps"], summary["planned_steps"]) == (4, 10)
    assert "stopped after 4 of 10" in summary["note"] and "60%" in summary["note"]
