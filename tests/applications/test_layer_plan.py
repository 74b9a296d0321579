"""Plans from the sensitivity of blocks: the paper's numbers, exact budgets, rules by hand, inputs that tell nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ine_callback.applications.layer_plan import CONSTANT, NOTHING, LayerPlan
from ine_callback.errors import InfluenceError

# LayerIF's walk-through: sensitivities of five of 32 blocks, and their parts of 160 - 32 experts
SENSITIVITY = np.array([5.01, 8.36, 7.99, 8.46, 8.16])
PARTS = np.array([1.12, 5.21, 4.55, 5.40, 4.84])
# its allocations of 160 experts to the 32 blocks of Mistral-7B
PUBLISHED = {
    "MRPC": [1, 4, 6, 3, 4, 7, 8, 11, 5, 12, 10, 12, 7, 9, 7, 5, 8, 5, 4, 1, 6, 6, 1, 1, 6, 3, 1, 3, 1, 1, 1, 1],
    "CoLA": [1, 9, 10, 8, 9, 12, 10, 7, 9, 9, 9, 8, 6, 9, 6, 4, 7, 3, 2, 1, 3, 4, 2, 1, 4, 1, 1, 1, 1, 1, 1, 1],
    "CommonQ": [1, 8, 6, 8, 7, 6, 10, 6, 11, 9, 8, 9, 7, 8, 7, 3, 7, 6, 5, 2, 6, 5, 2, 1, 1, 3, 1, 2, 1, 1, 2, 1],
    "OpenbookQ": [1, 5, 5, 8, 7, 5, 8, 7, 8, 5, 7, 7, 7, 6, 6, 6, 6, 6, 7, 5, 7, 5, 3, 2, 2, 4, 3, 4, 2, 2, 3, 1],
}
# of no unit, and far enough apart that none is equal to another by rounding
sensitivities = st.lists(st.integers(0, 1000), min_size=1, max_size=40).map(lambda values: np.array(values, float))
distinct = st.lists(st.integers(1, 1000), min_size=1, max_size=40, unique=True).map(lambda v: np.array(v, float))


def plan_of(sensitivity: np.ndarray) -> LayerPlan:
    return LayerPlan(tuple(f"B.{k}" for k in range(len(sensitivity))), sensitivity)


def test_the_papers_walk_through() -> None:
    many = 10**7
    found = plan_of(SENSITIVITY).experts(many, minimum=0).values / many
    np.testing.assert_allclose(found, PARTS / PARTS.sum(), rtol=2e-3)  # printed with three digits
    # the other 27 blocks as one value that makes the parts of all 32 sum to 128
    rest = ((128 / (PARTS / SENSITIVITY**3).mean() - (SENSITIVITY**3).sum()) / 27) ** (1 / 3)
    whole = plan_of(np.concatenate([SENSITIVITY, np.full(27, rest)])).experts(160).values
    # 28 experts remain: for the 27, whose fraction is .96, and for the largest of the five fractions
    np.testing.assert_array_equal(whole, [2, 6, 5, 6, 6, *[5] * 27])


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_allocations_keep_the_budget_and_are_what_the_rule_gives_for_their_shares(task: str) -> None:
    published = np.array(PUBLISHED[task])
    assert published.sum() == 160 and len(published) == 32 and published.min() == 1
    np.testing.assert_array_equal(plan_of(np.cbrt(published - 1)).experts(160).values, published)


@given(sensitivities, st.integers(0, 300), st.integers(0, 3), st.floats(0, 10))
def test_experts_keep_the_budget_and_the_order(values: np.ndarray, free: int, minimum: int, beta: float) -> None:
    total = free + minimum * len(values)
    found = plan_of(values).experts(total, beta, minimum)
    for counts in (found.values, found.ramp, found.reversed):
        assert counts.dtype == np.int64 and counts.sum() == total and counts.min() >= minimum
    more = values[:, None] > values[None]
    if beta > 0.1:  # below, parts of different blocks may be equal by rounding
        assert (found.values[:, None] >= found.values[None])[more].all()
        assert (found.reversed[:, None] <= found.reversed[None])[more].all()
        assert (np.diff(found.ramp) >= 0).all()
    same = plan_of(values).experts(total, 0.0, minimum).values
    assert same.max() - same.min() <= 1 and (np.diff(same) <= 0).all()  # what remains goes to the first blocks


@given(distinct, st.integers(0, 200), st.floats(1e-30, 1e30), st.randoms(use_true_random=False))
@example(np.array([1.0, 2.0, 5.0]), 4, 0.3, Random(0))  # parts of .5, 1, 2.5: two fractions equal but for rounding
def test_experts_follow_the_blocks_whatever_their_order_and_the_unit(
    values: np.ndarray, free: int, unit: float, random: Random
) -> None:
    total, order = free + len(values), list(range(len(values)))
    random.shuffle(order)
    for beta in (1.0, 3.0):
        counts = plan_of(values).experts(total, beta).values
        np.testing.assert_array_equal(plan_of(values * unit).experts(total, beta).values, counts)
        shuffled = plan_of(values[order]).experts(total, beta).values
        parts = values**beta / math.fsum(values**beta) * free
        tied = np.unique(np.round(parts % 1.0, 8)).size < len(parts)
        if not tied:  # ties go by the blocks' order
            np.testing.assert_array_equal(shuffled, counts[order])


@given(
    sensitivities,
    st.floats(0, 1),
    st.floats(0, 0.999),
    st.booleans(),
    st.lists(st.floats(1.0, 1e9), min_size=40, max_size=40),
    st.floats(1e-30, 1e30),
)
def test_sparsity_meets_the_budget(
    values: np.ndarray, budget: float, epsilon: float, smooth: bool, all_sizes: list[float], unit: float
) -> None:
    sizes = np.array(all_sizes[: len(values)])
    found = plan_of(values).sparsity(budget, epsilon, sizes.tolist(), smooth)
    for fractions in (found.values, found.ramp, found.reversed):
        assert abs((fractions * sizes).sum() - budget * sizes.sum()) < 1e-9 * sizes.sum()
        assert fractions.min() >= 0.0 and fractions.max() <= 1.0
    again = plan_of(values * unit).sparsity(budget, epsilon, sizes.tolist(), smooth)
    np.testing.assert_allclose(again.values, found.values, atol=1e-9)
    if not smooth:
        more = values[:, None] > values[None]
        assert (found.values[:, None] >= found.values[None] - 1e-12)[more].all()


def test_the_filter_by_hand() -> None:
    """Window 7, order 3: neighbours weigh (-2, 3, 6, 7, 6, 3, -2) / 21, so an impulse overshoots."""
    values = np.full(15, 4.0)
    values[7] = 9.0
    wanted = (np.array([0, 0, 0, 0, -2, 3, 6, 7, 6, 3, -2, 0, 0, 0, 0]) + 2) / 9  # stretched to 0 ... 1 again
    phi = 0.7 + 0.6 * wanted
    np.testing.assert_allclose(plan_of(values).sparsity(0.5).values, 0.5 * phi / phi.mean(), atol=1e-12)
    raw = 0.7 + 0.6 * (values == 9.0)
    np.testing.assert_allclose(plan_of(values).sparsity(0.5, smooth=False).values, 0.5 * raw / raw.mean(), atol=1e-12)


def test_a_cubic_passes_the_filter_as_it_is() -> None:
    plan = plan_of((np.arange(11.0) - 4) ** 3 + 100)
    np.testing.assert_allclose(plan.sparsity(0.5).values, plan.sparsity(0.5, smooth=False).values, atol=1e-12)


@pytest.mark.parametrize("count", range(2, 7))
def test_few_blocks_are_smoothed_by_a_smaller_window_or_not(count: int) -> None:
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])[:count]
    rough, smooth = (plan_of(values).sparsity(0.5, smooth=each).values for each in (False, True))
    assert np.allclose(rough, smooth) == (count < 5)


def test_what_does_not_fit_is_spread_over_the_others() -> None:
    """φ = .7, 1, 1.3 at a budget of .9: the last is full, (2.7 - 1) / 1.7 = 1 is left for the others."""
    np.testing.assert_allclose(plan_of(np.array([0.0, 1, 2])).sparsity(0.9).values, [0.7, 1.0, 1.0], atol=1e-12)
    # sizes 1, 2, 5 at .8, ε = .5: φ = .5, 1, 1.5, η = 6.4 / 10 fits; at .9 7.2 / 10 does not: (7.2 - 5) / 2.5 = .88
    plan = plan_of(np.array([0.0, 1, 2]))
    np.testing.assert_allclose(plan.sparsity(0.8, 0.5, [1, 2, 5]).values, [0.32, 0.64, 0.96], atol=1e-12)
    np.testing.assert_allclose(plan.sparsity(0.9, 0.5, [1, 2, 5]).values, [0.44, 0.88, 1.0], atol=1e-12)
    assert (plan.sparsity(1.0).values == 1.0).all() and (plan.sparsity(0.0).values == 0.0).all()


def test_the_controls() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, 12)
    here, there = plan_of(values), plan_of(values.max() + values.min() - values)
    np.testing.assert_allclose(here.sparsity(0.5).reversed, there.sparsity(0.5).values, atol=1e-12)
    np.testing.assert_array_equal(here.experts(60).reversed, there.experts(60).values)
    np.testing.assert_allclose(here.sparsity(0.5).ramp, 0.5 * np.linspace(0.7, 1.3, 12), atol=1e-12)
    np.testing.assert_array_equal(here.experts(78, beta=1.0, minimum=0).ramp, np.arange(12) + 1)


@pytest.mark.parametrize(
    ("values", "note"),
    [([3.0] * 6, CONSTANT), ([0.1 + 0.2, 0.3], CONSTANT), ([0.0] * 6, NOTHING), ([-1.0, -5.0, 0.0, -2.0], NOTHING)],
)
def test_sensitivities_that_tell_nothing_give_uniform_plans_and_a_note(values: list[float], note: str) -> None:
    plan = plan_of(np.array(values))
    pruned, experts = plan.sparsity(0.6), plan.experts(2 * len(values))
    assert np.allclose(pruned.values, 0.6) and (experts.values == 2).all()
    assert pruned.notes == experts.notes == (note,) and note in str(pruned)


def test_sensitivities_below_0_count_as_0() -> None:
    found = plan_of(np.array([-3.0, 0.0, 2.0, 4.0])).experts(13)
    np.testing.assert_array_equal(found.values, [1, 1, 2, 9])
    assert "1 of 4 sensitivities are below 0" in found.notes[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_name(value: float) -> None:
    with pytest.raises(InfluenceError, match=r"LayerPlan: the sensitivity of 'B\.1' is"):
        plan_of(np.array([1.0, value]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerPlan((), np.array([])), "0 blocks"),
        (lambda: LayerPlan(("a",), np.ones(2)), r"shape \(2,\)"),
        (lambda: plan_of(np.ones(4)).experts(3), "total=3 is less than 1 for each of 4 blocks"),
        (lambda: plan_of(np.ones(4)).experts(9.5), "total=9.5; give a whole number"),  # type: ignore[arg-type]
        (lambda: plan_of(np.ones(4)).experts(9, minimum=-1), "minimum=-1"),
        (lambda: plan_of(np.ones(4)).experts(9, beta=-1.0), "beta=-1.0"),
        (lambda: plan_of(np.ones(4)).experts(9, beta=math.nan), "beta=nan"),
        (lambda: plan_of(np.ones(4)).sparsity(1.2), "budget=1.2"),
        (lambda: plan_of(np.ones(4)).sparsity(0.5, 1.0), "epsilon=1.0"),
        (lambda: plan_of(np.ones(4)).sparsity(0.5, sizes=[1, 2]), "each of the 4 blocks"),
        (lambda: plan_of(np.ones(2)).sparsity(0.5, sizes=[1, 0]), "above 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        call()
