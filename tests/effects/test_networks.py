"""Networks as nuisances: one fit of stacked copies is K fits, copies do not see their own fold, nothing leaks out."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ine_callback.effects import ATE, NDE, WCDE, CrossFitNuisances, EffectData, Networks, estimate
from ine_callback.effects.networks import Batches, fit, perceptron
from ine_callback.errors import InfluenceError

ROWS, FOLDS, EPOCHS, SIZE = 90, 3, 4, 16


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Columns, targets of each copy, and weights that hide its own fold, in double precision."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, generator=made, dtype=torch.float64) * 3 + 1
    y = x[:, :1].sin() + 0.1 * torch.randn(ROWS, FOLDS, generator=made, dtype=torch.float64)
    folds = torch.arange(ROWS) % FOLDS
    return x, y, (folds[:, None] != torch.arange(FOLDS)).double()


def trained(x: Tensor, y: Tensor, weights: Tensor, classes: bool = False) -> CrossFitNuisances:
    module = CrossFitNuisances(perceptron, x, y, weights, classes, seed=3)
    fit(module, Batches([x, y, weights], SIZE, 7), EPOCHS)
    return module


@pytest.mark.parametrize("classes", [False, True], ids=["means", "probabilities"])
def test_one_fit_is_as_many_fits_as_there_are_copies(classes: bool) -> None:
    x, y, weights = data()
    y = (y > 0).double() if classes else y
    together = trained(x, y, weights, classes)(x)
    for k in range(FOLDS):
        alone = trained(x, y[:, k : k + 1], weights[:, k : k + 1], classes)(x)[0]
        assert (together[k] - alone).abs().max() < 1e-9
    assert (together[0] - together[1]).abs().max() > 1e-3  # they differ


def test_a_copy_is_a_network_trained_on_its_rows_in_a_plain_loop() -> None:
    x, y, weights = data()
    together = trained(x, y, weights)(x)
    for k in range(FOLDS):
        mine = weights[:, k] > 0
        middle, scale = x[mine].mean(0), x[mine].std(0, correction=0)
        target, unit = y[mine, k].mean(), y[mine, k].std(correction=0)
        torch.manual_seed(3)
        network = perceptron(2).double()
        steps = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
        order = torch.Generator().manual_seed(7)
        for _ in range(EPOCHS):
            for part in torch.randperm(ROWS, generator=order).split(SIZE):
                rows = part[mine[part]]
                found = network((x[rows] - middle) / scale)[:, 0]
                steps.zero_grad()
                ((found - (y[rows, k] - target) / unit) ** 2).mean().backward()
                steps.step()
        assert (network((x - middle) / scale)[:, 0] * unit + target - together[k]).abs().max() < 1e-9


def test_a_copy_does_not_see_its_own_fold() -> None:
    x, y, weights = data()
    before = trained(x, y, weights)
    hidden = weights[:, 1] == 0
    other_x, other_y = x.clone(), y.clone()
    other_x[hidden], other_y[hidden] = 100.0, -100.0
    after = trained(other_x, other_y, weights)
    assert (before.predict(1, x) - after.predict(1, x)).abs().max() < 1e-12
    assert (before.predict(0, x) - after.predict(0, x)).abs().max() > 0.1


def curved(rows: int, seed: int) -> EffectData:
    """Effect 1; treatment and outcome both follow a curve of C."""
    rng = np.random.default_rng(seed)
    c = rng.uniform(-2, 2, rows)
    a = rng.random(rows) < 1 / (1 + np.exp(-2 * np.sin(2 * c)))
    y = a + 2 * np.sin(2 * c) + 0.3 * rng.normal(size=rows)
    return EffectData({"C": c, "A": a, "Y": y}, "A", "Y", "C -> A -> Y; C -> Y")


@pytest.mark.long
def test_networks_see_curves() -> None:
    linear = estimate(curved(2000, 0), ATE(), "linear")
    found = estimate(curved(2000, 0), ATE(), Networks())
    assert abs(linear.estimate - 1) > 0.3 and abs(found.estimate - 1) < 3 * found.standard_error < 0.15
    assert found.nuisances == "networks" and abs(found.influence.mean()) < 1e-9
    again = estimate(curved(2000, 0), ATE(), "network")
    assert again.estimate == found.estimate  # seeded, and the same by its word


@pytest.mark.long
def test_all_estimands_take_networks() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 600)
    m = 0.8 * a + rng.normal(size=600)
    made = EffectData({"A": a, "M": m, "Y": 0.5 * a - m + rng.normal(size=600)}, "A", "Y", "A -> M -> Y; A -> Y")
    for estimand in (WCDE(), NDE()):
        found = estimate(made, estimand, Networks(epochs=8))
        assert abs(found.estimate - 0.5) < 4 * found.standard_error < 0.8


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_a_fit_leaves_random_states_and_ignores_what_the_environment_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INE_CALLBACK", "1")
    before = states()
    with torch.no_grad():  # as at the end of a fit
        estimate(curved(300, 0), ATE(), Networks(epochs=1))
    assert states() == before and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"network": lambda d: nn.Sequential(nn.Linear(d, 1), nn.BatchNorm1d(1))}, "has buffers .*running_mean"),
        ({"network": lambda d: nn.Linear(d, 2)}, r"gives \(2, 2\) for 2 rows"),
        ({"epochs": 0}, "epochs=0; give a number above 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; give a number above 0"),
    ],
)
def test_what_cannot_be_stacked_or_trained_is_refused(made: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=f"^Networks: .*{message}"):
        estimate(curved(300, 0), ATE(), Networks(**made))


def test_the_network_is_the_user_s() -> None:
    found = estimate(curved(1000, 0), ATE(), Networks(network=partial(nn.Linear, out_features=1), epochs=30))
    linear = estimate(curved(1000, 0), ATE(), "linear")
    assert abs(found.estimate - linear.estimate) < 0.15  # a line, so as wrong as lines are
