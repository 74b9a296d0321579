"""How far is too far: as far as the loss is one basin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ine_callback.bif.locality import RADIUS, forgotten, pull
from ine_callback.bif.quadratic import Quadratic

P = 40
WEIGHTS = torch.full((P,), 0.5)
NORMAL = torch.randn(4, P, generator=torch.Generator().manual_seed(0))
FLAT = Quadratic(torch.zeros(1, P), 1.0, 1.0)


def radius(loss: object, n_beta: float | None = None) -> float:
    """In norms of the weights."""
    found = pull(FLAT, WEIGHTS, n_beta, loss, NORMAL)  # type: ignore[arg-type]
    return float((P / found) ** 0.5 / WEIGHTS.norm())


def well(width: float) -> object:
    """A quadratic basin that is flat outside of its width."""
    return lambda d: 1.0 - torch.exp(-d.square().sum(1) / width**2)


@pytest.mark.parametrize("n_beta", [None, 10.0])
def test_a_basin_gets_half_the_weights_norm(n_beta: float | None) -> None:
    assert radius(lambda d: 2.0 + d.square().sum(1), n_beta) == pytest.approx(RADIUS)
    assert radius(lambda d: 2.0 + d.square().sum(1) + 2 * d[:, 0]) == pytest.approx(RADIUS)  # a slope is no matter


def test_a_narrow_basin_gets_less() -> None:
    found = [radius(well(width)) for width in (100.0, 1.0, 0.3)]
    assert found[0] == pytest.approx(RADIUS) and found[0] > found[1] > found[2] > 0
    assert found[1] * float(WEIGHTS.norm()) < 1.0


def test_losses_that_explode_or_do_not_care() -> None:
    assert radius(lambda d: d.square().sum(1) ** 3) < RADIUS / 8  # never four times as much: as near as is tried
    assert radius(lambda d: torch.ones(len(d))) == pytest.approx(RADIUS)
    assert pull(FLAT, torch.zeros(P), None, lambda d: d.sum(1), NORMAL) == 1.0


def test_where_the_data_are_steep_draws_stay_near() -> None:
    """The posterior's draws are tried, not the prior's: a steep direction is no reason to stay nearer in all others."""
    steep = torch.zeros(1, P)
    steep[0, 0] = 30.0

    def loss(d: Tensor) -> Tensor:
        return 1.0 + d[:, 1:].square().sum(1) + torch.where(d[:, 0].abs() < 0.1, d[:, 0] ** 2, 50.0)

    near = pull(Quadratic(steep, 1.0, 1.0), WEIGHTS, 1000.0, loss, NORMAL)
    assert near < pull(FLAT, WEIGHTS, None, loss, NORMAL)


def test_draws_stay_where_the_model_knows() -> None:
    """A basin as wide as you like, whose loss is soon above that of no weights at all."""

    def steep(height: float) -> object:
        return lambda d: 2.0 + height * d.square().sum(1) - (height - 1) * 10.0 * ((d + 0.5).abs().amax(1) < 1e-3)

    assert radius(steep(1.0)) == pytest.approx(RADIUS)
    found = [radius(steep(height)) for height in (2.0, 6.0, 100.0)]
    assert RADIUS > found[0] > found[1] > found[2]
    assert [forgotten(loss, 2.0, 12.0) for loss in (2.0, 12.0)] == [0.0, 1.0] and math.isnan(forgotten(3.0, 2.0, 2.0))
