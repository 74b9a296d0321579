"""How far is too far: as far as the loss is one basin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ine_callback.bif.locality import RADIUS, pull
from ine_callback.bif.quadratic import Quadratic

P = 40
WEIGHTS = torch.full((P,), 0.5)
DRAWS = torch.Generator().manual_seed(0)
FLAT = Quadratic(torch.zeros(1, P), 1.0, 1.0)


Losses = Callable[[Tensor], Tensor]


def normal() -> Tensor:
    return torch.randn(4, P, generator=DRAWS)


def found_by(losses: Losses, fisher: Quadratic = FLAT, n_beta: float | None = None) -> float:
    """γ for losses [C] or [C, R]."""
    return pull(fisher, WEIGHTS, n_beta, lambda d: losses(d).reshape(len(d), -1), normal)


def radius(losses: Losses, n_beta: float | None = None) -> float:
    """In norms of the weights."""
    return float((P / found_by(losses, n_beta=n_beta)) ** 0.5 / WEIGHTS.norm())


def well(width: float) -> Losses:
    """A quadratic basin that is flat outside of its width."""
    return lambda d: 1.0 - torch.exp(-d.square().sum(1) / width**2)


@pytest.mark.parametrize("n_beta", [None, 10.0])
def test_a_basin_gets_half_the_weights_norm(n_beta: float | None) -> None:
    assert radius(lambda d: 2.0 + d.square().sum(1), n_beta) == pytest.approx(RADIUS)
    assert radius(lambda d: 2.0 + d.square().sum(1) + 9 * d[:, 0]) == pytest.approx(RADIUS)  # a slope is no matter


def test_a_narrow_basin_gets_less() -> None:
    found = [radius(well(width)) for width in (100.0, 1.0, 0.3)]
    assert found[0] == pytest.approx(RADIUS) and found[0] > found[1] > found[2] > 0
    assert found[1] * float(WEIGHTS.norm()) < 1.0


def test_losses_that_explode_or_do_not_care() -> None:
    assert radius(lambda d: d.square().sum(1) ** 3) < RADIUS / 8  # never four times as much: as near as is tried
    assert radius(lambda d: torch.ones(len(d))) == pytest.approx(RADIUS)
    assert pull(FLAT, torch.zeros(P), None, lambda d: d.sum(1), normal) == 1.0


def test_where_the_data_are_steep_draws_stay_near() -> None:
    """The posterior's draws are tried, not the prior's: a steep direction is no reason to stay nearer in all others."""
    steep = torch.zeros(1, P)
    steep[0, 0] = 30.0

    def loss(d: Tensor) -> Tensor:
        return 1.0 + d[:, 1:].square().sum(1) + torch.where(d[:, 0].abs() < 0.1, d[:, 0] ** 2, 50.0)

    assert found_by(loss, Quadratic(steep, 1.0, 1.0), 1000.0) < found_by(loss)


def test_draws_stay_where_slopes_tell_rows_apart() -> None:
    """Rows with slopes of one size, and bends that grow from row to row."""
    slopes = torch.randn(P, 30, generator=torch.Generator().manual_seed(1))

    def rows(bend: float) -> Losses:
        return lambda d: 2.0 + d @ slopes + bend * d.square().sum(1, keepdim=True) * torch.linspace(0, 1, 30)

    found = [radius(rows(bend)) for bend in (0.0, 0.1, 10.0, 30.0)]
    assert found[0] == found[1] == pytest.approx(RADIUS) and found[1] > found[2] > found[3]
