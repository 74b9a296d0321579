"""The scale of training randomness: what random initial weights leave in a query."""

from __future__ import annotations

import pytest
import torch
from oracle import Keep, cross_entropy, mlp
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.options import InitialWeights
from ine_callback.queries import CallableQuery


def unit_of(model: nn.Module, weights: InitialWeights, query: object, width: int = 4) -> tuple[Tensor, Recorder]:
    """The unit at a run's only step: no training remains, so U = v."""
    x, y = torch.randn(6, width), torch.randint(3, (6,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(
        model,
        sgd,
        6,
        {"q": query, "self": "self"},
        cross_entropy,
        [Keep()],
        1,
        initial_weights=weights,
        on_error="raise",
    )
    with recorder:
        with recorder.batch(torch.arange(6), (x, y)):
            cross_entropy(model, (x, y)).backward()
        sgd.step()
    return recorder.signals.unit, recorder


def test_unit_is_the_spread_over_initial_weights() -> None:
    """A query linear in the weights: its standard deviation over 4,000 drawn networks, to 12 %."""
    x = torch.randn(1, 64)
    query = CallableQuery(lambda module, batch: module(batch[0]).sum(), (x, x))
    unit, _ = unit_of(nn.Linear(64, 3, bias=False), "random", query, 64)
    drawn = torch.stack([nn.Linear(64, 3, bias=False)(x).sum().detach() for _ in range(4000)])
    # one draw of the weights: 192 uniform entries tell their standard deviation to 3 %
    assert float(unit[0]) == pytest.approx(float(drawn.std()), rel=0.12)
    assert float(unit[1]) == 1.0


def test_unit_by_hand() -> None:
    model = mlp()
    variances = {p: p.detach().var(unbiased=False) for p in model.parameters()}
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    gradients = torch.autograd.grad(cross_entropy(model, (x, y)), list(variances))
    expected = sum(v * g.square().sum() for v, g in zip(variances.values(), gradients, strict=True)) ** 0.5
    unit, recorder = unit_of(model, "random", (x, y))
    torch.testing.assert_close(unit[0], expected)
    assert recorder.signals.notes() == []


def test_fixed_weights_leave_a_plain_norm() -> None:
    model, x, y = mlp(), torch.randn(2, 4), torch.tensor([0, 1])
    gradients = torch.autograd.grad(cross_entropy(model, (x, y)), list(model.parameters()))
    unit, _ = unit_of(model, "fixed", (x, y))
    torch.testing.assert_close(unit[0], sum(g.square().sum() for g in gradients) ** 0.5)


def test_weights_that_start_alike_are_no_noise() -> None:
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    _, recorder = unit_of(model, "random", (torch.randn(2, 4), torch.tensor([0, 1])))
    assert not recorder.signals.noise.random
    assert any("initial weights are all alike" in note for note in recorder.signals.notes())
