"""Weights along a run: which are kept, and which a closing pass gets."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ine_callback.recording.snapshots import RATIO, SHARES, SPACING, Snapshots


def run(steps: int, loss: Callable[[int], float], snapshots: Snapshots | None = None, start: int = 0) -> Snapshots:
    """Steps whose weights are the number of the step; ``loss`` tells the summed loss."""
    model = nn.Linear(1, 1, bias=False).double()
    snapshots = Snapshots(wanted=True) if snapshots is None else snapshots
    for step in range(start + 1, steps + 1):
        model.weight.data.fill_(step)
        snapshots.keep(model, step, lambda step=step: torch.tensor(loss(step)))  # type: ignore[misc]
    return snapshots


def shares(steps: int, loss: Callable[[int], float]) -> np.ndarray:
    """Share of a run's time after each step [steps], step by step."""
    gained = np.diff([loss(step) for step in range(steps + 1)]).clip(0)
    time = np.cumsum(np.log1p(gained / gained.mean()))
    return np.asarray(time / time[-1])


def chosen(snapshots: Snapshots, steps: int, loss: float) -> list[int]:
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(steps)
    return sorted(int(model.weight) for _ in snapshots.load(model, snapshots.chosen(steps, loss)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(0.05, 1.0))
def test_the_chosen_are_near_the_shares_of_the_loss_and_few_are_kept(steps: int, power: float) -> None:
    """Summed losses t^p: from constant losses to ones that vanish at once."""
    snapshots = run(steps, lambda t: float(t**power))
    assert len(snapshots) <= 1 / SPACING
    time = shares(steps, lambda t: float(t**power))
    reached = [time[t - 1] for t in chosen(snapshots, steps, steps**power)]
    for share in SHARES:
        step = int((time < share).sum()) + 1
        gap = share - time[max(0, int(step / RATIO) - 2)] + SPACING + time[0]
        assert min(abs(one - share) for one in reached) <= gap


def test_constant_losses_and_unknown_ones_count_steps() -> None:
    known = chosen(run(1000, float), 1000, 1000.0)
    for unknown in (math.nan, 0.0):
        assert chosen(run(1000, lambda _, u=unknown: u), 1000, unknown) == known  # type: ignore[misc]
    for step, share in zip(known, SHARES, strict=True):
        assert abs(step / 1000 - share) < 0.09


def test_losses_that_do_not_grow_count_steps() -> None:
    """A loss may be negative, such as a density's."""
    assert chosen(run(1000, lambda t: -float(t)), 1000, -1000.0) == chosen(run(1000, float), 1000, 1000.0)


def test_a_run_that_learns_at_once_has_early_weights() -> None:
    rounding = lambda t: 1e-6 * math.sin(t)  # noqa: E731  # of a sum over many rows
    early = chosen(run(5000, lambda t: 1 - 0.99**t + rounding(t)), 5000, 1.0)
    time = shares(5000, lambda t: 1 - 0.99**t)
    for step, share in zip(early, SHARES, strict=True):
        assert abs(time[step - 1] - share) < SPACING
    assert max(early) < 700


def test_a_few_steps_of_huge_losses_are_not_the_whole_run() -> None:
    """A thousand times the usual loss in each of ten steps, of a thousand."""

    def loss(step: int) -> float:
        return 1000.0 * min(step, 10) + max(0, step - 10)

    found = chosen(run(1000, loss), 1000, loss(1000))
    assert found[0] > 150 and found[-1] > 700


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_what_there_is(steps: int) -> None:
    found = chosen(run(steps, float), steps, float(steps))
    assert found and set(found) <= set(range(1, steps + 1))


def test_a_resumed_run_keeps_the_same() -> None:
    whole, first = run(700, lambda t: t**0.5), run(300, lambda t: t**0.5)
    again = Snapshots(wanted=True)
    again.load_state_dict(first.state_dict())
    run(700, lambda t: t**0.5, again, start=300)
    states = [one.state_dict()["taken"] for one in (again, whole)]
    assert len({str([(one["steps"], one["tensors"] is None) for one in state]) for state in states}) == 1
    assert chosen(again, 700, 700**0.5) == chosen(whole, 700, 700**0.5)


def test_nothing_is_kept_where_nobody_wants_it() -> None:
    assert len(run(20, float, Snapshots(wanted=False))) == 0
