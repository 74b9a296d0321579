"""The localization: draws stay in one basin of the loss and lose little of what was learned."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ine_callback.methods.bif.localization import START_DISTANCE, choose_localization, learning_lost
from ine_callback.methods.bif.quadratic_posterior import QuadraticPosterior

P = 40
WEIGHTS = torch.full((P,), 0.5)
NORMAL = torch.randn(4, P, generator=torch.Generator().manual_seed(0))
FLAT = QuadraticPosterior(torch.zeros(1, P), 1.0, 1.0)


def radius(loss: object, n_beta: float | None = None) -> float:
    """In norms of the weights."""
    found = choose_localization(FLAT, WEIGHTS, n_beta, loss, NORMAL)  # type: ignore[arg-type]
    return float((P / found) ** 0.5 / WEIGHTS.norm())


def well(width: float) -> object:
    """A quadratic basin that is flat outside of its width."""
    return lambda d: 1.0 - torch.exp(-d.square().sum(1) / width**2)


def bowl(height: float, rim: float = 30.0) -> Callable[[Tensor], Tensor]:
    """A basin as wide as you like; where all weights are 0 the loss is ``rim`` higher than at the trained ones."""
    return lambda d: 2.0 + height * d.square().sum(1) + (rim - height * 10.0) * ((d + 0.5).abs().amax(1) < 1e-3)


@pytest.mark.parametrize("n_beta", [None, 10.0])
def test_a_basin_gets_half_the_weights_norm(n_beta: float | None) -> None:
    assert radius(bowl(1.0), n_beta) == pytest.approx(START_DISTANCE)
    assert radius(lambda d: bowl(1.0)(d) + 2 * d[:, 0]) == pytest.approx(START_DISTANCE)  # a slope is no matter


def test_a_narrow_basin_gets_less() -> None:
    found = [radius(well(width)) for width in (100.0, 1.0, 0.3)]
    assert found[0] > found[1] > found[2] > 0
    assert found[1] * float(WEIGHTS.norm()) < 1.0


def test_exploding_losses_get_the_smallest_distance_and_constant_ones_the_largest() -> None:
    # the loss never rises about four times as much, so the smallest distance is chosen
    assert radius(lambda d: d.square().sum(1) ** 3) < START_DISTANCE / 8
    assert radius(lambda d: torch.ones(len(d))) == pytest.approx(START_DISTANCE)
    assert choose_localization(FLAT, torch.zeros(P), None, lambda d: d.sum(1), NORMAL) == 1.0


def test_where_the_data_are_steep_draws_stay_near() -> None:
    """The posterior's draws are tried, not the prior's: a steep direction is no reason to stay nearer in all others."""
    steep = torch.zeros(1, P)
    steep[0, 0] = 30.0

    def loss(d: Tensor) -> Tensor:
        return 1.0 + d[:, 1:].square().sum(1) + torch.where(d[:, 0].abs() < 0.1, d[:, 0] ** 2, 50.0)

    near = choose_localization(QuadraticPosterior(steep, 1.0, 1.0), WEIGHTS, 1000.0, loss, NORMAL)
    assert near < choose_localization(FLAT, WEIGHTS, None, loss, NORMAL)


def test_draws_stay_where_little_learning_is_lost() -> None:
    assert radius(bowl(1.0)) == pytest.approx(START_DISTANCE)
    found = [radius(bowl(height)) for height in (2.0, 6.0, 100.0)]
    assert START_DISTANCE > found[0] > found[1] > found[2]
    assert [learning_lost(loss, 2.0, 12.0) for loss in (2.0, 12.0)] == [0.0, 1.0] and math.isnan(
        learning_lost(3.0, 2.0, 2.0)
    )


def test_draws_lose_no_more_than_a_tenth_of_what_was_learned() -> None:
    for height in (0.5, 1.0, 4.0, 20.0):
        found = radius(bowl(height))
        draws = found * float(WEIGHTS.norm()) * NORMAL / P**0.5
        lost = learning_lost(float(bowl(height)(draws).mean()), 2.0, 32.0)
        # of these few draws; half the distance more would have been allowed, were it not for the next doubling
        assert lost < 0.11 and (found == pytest.approx(START_DISTANCE) or 4 * lost > 0.09)
