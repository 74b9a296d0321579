"""Schedules read ahead against real runs, and the learning rate that remains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs

from ine_callback.optimizers.schedule import Schedule, planned_schedule

STEPS = 24

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
def test_the_planned_schedule_equals_the_real_run(make: Make, kind: type[Optimizer]) -> None:
    optimizer = make_optimizer(kind)
    schedulers = make(optimizer)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    states = [copy.deepcopy(s.state_dict()) for s, _ in schedulers]
    step = optimizer.step
    schedule = planned_schedule(optimizer, STEPS, schedulers)
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


def test_a_schedule_planned_in_the_middle_of_a_run_equals_the_rest() -> None:
    optimizer = make_optimizer()
    schedulers = SCHEDULES["cosine"](optimizer)
    real_rates(optimizer, schedulers, 10)
    schedule = planned_schedule(optimizer, STEPS - 10, schedulers)
    assert schedule.planned == pytest.approx(real_rates(optimizer, schedulers, STEPS - 10), rel=1e-12)


def test_a_plateau_scheduler_is_taken_as_constant_with_a_note() -> None:
    optimizer = make_optimizer()
    scheduler = lrs.ReduceLROnPlateau(optimizer, patience=0)
    schedule = planned_schedule(optimizer, 5, [(scheduler, 1)])
    assert schedule.planned == (0.1,) * 5
    assert scheduler.num_bad_epochs == 0
    for steps in (3, 2):  # also where early stopping has something to say
        for _ in range(steps):
            schedule.advance(0.1)
        assert "plateau" in schedule.summary()["note"]


def test_a_scheduler_past_its_end_keeps_its_last_rate() -> None:
    optimizer = make_optimizer()
    schedulers = [(lrs.OneCycleLR(optimizer, 0.5, total_steps=6), 1)]
    schedule = planned_schedule(optimizer, 10, schedulers)
    real = real_rates(optimizer, schedulers, 6)
    assert schedule.planned == pytest.approx([*real, *[optimizer.param_groups[0]["lr"]] * 4])
    with pytest.raises(ValueError, match="total"):
        schedulers[0][0].step()


def test_a_scheduler_that_cannot_be_copied_is_taken_as_constant_with_a_note() -> None:
    class Odd(lrs.LRScheduler):
        def get_lr(self) -> list[float]:
            return [0.1, 0.1]

        def __deepcopy__(self, memo: dict[int, Any]) -> Odd:
            raise TypeError("not this one")

    optimizer = make_optimizer()
    schedule = planned_schedule(optimizer, 4, [(Odd(optimizer), 1)])
    assert schedule.planned == (0.1,) * 4
    assert "TypeError: not this one" in schedule.note


def test_the_module_that_a_scheduler_refers_to_is_not_copied() -> None:
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
    schedule = planned_schedule(optimizer, 4, [(lrs.LambdaLR(optimizer, module.factor), 1)], keep=[module])
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


def test_a_rate_that_differs_from_the_planned_one_rescales_the_rest() -> None:
    schedule = Schedule([0.1] * 10)
    schedule.advance(0.1)
    assert schedule.remaining(0.05) == pytest.approx(8 * 0.05)


def test_a_planned_rate_of_zero_is_not_divided_by() -> None:
    schedule = Schedule([0.0, 0.1, 0.1])
    assert schedule.remaining(0.0) == pytest.approx(0.2)


def test_nothing_remains_after_the_planned_steps() -> None:
    schedule = Schedule([0.1] * 2)
    for _ in range(5):
        schedule.advance(0.1)
    assert schedule.remaining(0.1) == 0.0


def test_with_an_unknown_horizon_as_much_remains_as_has_passed() -> None:
    for steps in (0, -1, math.inf):
        schedule = planned_schedule(make_optimizer(), steps)
        assert schedule.planned == ()
    assert schedule.remaining(0.1) == 0.0
    for lr in (0.1, 0.2):
        schedule.advance(lr)
    assert schedule.remaining(0.2) == pytest.approx(0.3)
    assert "unknown horizon" in schedule.summary()["note"]


def test_early_stopping_is_noted_in_the_summary() -> None:
    schedule = Schedule([0.1] * 10)
    for _ in range(4):
        schedule.advance(0.1)
    summary = schedule.summary()
    assert (summary["steps"], summary["planned_steps"]) == (4, 10)
    assert "stopped after 4 of 10" in summary["note"] and "60%" in summary["note"]


def test_a_learning_rate_that_is_a_tensor_is_read_ahead_and_left_alone() -> None:
    """Schedulers fill such a tensor in place: the copies must not have the real one."""
    optimizer = AdamW([nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    schedule = planned_schedule(optimizer, 3, [(scheduler, 1)])
    assert schedule.planned == pytest.approx((0.1, 0.05, 0.025))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
