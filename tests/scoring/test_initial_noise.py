"""The scale of training randomness: what random initial weights leave in a query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.queries import CallableQuery
from ine_callback.utilities.options import InitialWeights
from tests.helpers.oracle import BY_NAME, Keep, cross_entropy, mlp


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
        [keep := Keep()],
        1,
        initial_weights=weights,
        on_error="raise",
    )
    with recorder:
        with recorder.batch(torch.arange(6), (x, y)):
            cross_entropy(model, (x, y)).backward()
        sgd.step()
    return keep.units[0], recorder


def test_the_unit_is_the_standard_deviation_over_initial_weights() -> None:
    """A query linear in the weights: its standard deviation over 4,000 drawn networks, to 12 %."""
    x = torch.randn(1, 64)
    query = CallableQuery(lambda module, batch: module(batch[0]).sum(), (x, x))
    unit, _ = unit_of(nn.Linear(64, 3, bias=False), "random", query, 64)
    drawn = torch.stack([nn.Linear(64, 3, bias=False)(x).sum().detach() for _ in range(4000)])
    # one draw of the weights: 192 uniform entries tell their standard deviation to 3 %
    assert float(unit[0, 0]) == pytest.approx(float(drawn.std()), rel=0.12)


def test_the_unit_equals_the_hand_computed_one() -> None:
    model = mlp()
    variances = {p: p.detach().var(unbiased=False) for p in model.parameters()}
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    gradients = torch.autograd.grad(cross_entropy(model, (x, y)), list(variances))
    expected = sum(v * g.square().sum() for v, g in zip(variances.values(), gradients, strict=True)) ** 0.5
    unit, recorder = unit_of(model, "random", (x, y))
    torch.testing.assert_close(unit[:, 0], expected.expand(6))
    assert recorder.signals.notes() == []


def test_fixed_weights_give_the_plain_norm() -> None:
    model, x, y = mlp(), torch.randn(2, 4), torch.tensor([0, 1])
    gradients = torch.autograd.grad(cross_entropy(model, (x, y)), list(model.parameters()))
    unit, _ = unit_of(model, "fixed", (x, y))
    torch.testing.assert_close(unit[:, 0], (sum(g.square().sum() for g in gradients) ** 0.5).expand(6))


@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet", "bag", "lstm"])
@pytest.mark.parametrize("weights", ["random", "fixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_self_influences_units_equal_a_loop_over_rows(name: str, weights: InitialWeights, accumulate: int) -> None:
    """|sigma g_i| of every row's own loss, the sigma of a layer's weight standing for its bias too."""
    setting = BY_NAME[name]
    model, (x, y) = setting.model().double(), setting.data()
    variances = {p: p.detach().float().var(unbiased=False) for p in model.parameters()}
    expected = torch.zeros(len(x), dtype=torch.float64)
    model.train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for k in range(len(x)):
        gradients = torch.autograd.grad(cross_entropy(model, (x[k : k + 1], y[k : k + 1])), list(named.values()))
        for (full_name, p), g in zip(named.items(), gradients, strict=True):
            weight = named.get(full_name.replace("bias", "weight"), p)
            expected[k] += (variances[weight] if weights == "random" else 1.0) * g.square().sum()
    sgd, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(
        *(model, sgd, len(x), "self", cross_entropy, [keep], 1),
        discount=False,
        initial_weights=weights,
        accumulate=accumulate,
        uncaptured=setting.uncaptured,
        on_error="raise",
    )
    with recorder:
        for rows in torch.arange(len(x)).chunk(accumulate):
            with recorder.batch(rows, (x[rows], y[rows])):
                loss = cross_entropy(model, (x[rows], y[rows])) / accumulate
                recorder.see(loss)
                loss.backward()
        sgd.step()
    torch.testing.assert_close(keep.units[0][:, -1], expected.sqrt(), rtol=1e-6, atol=1e-9)


def test_weights_that_are_all_alike_give_no_noise() -> None:
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    _, recorder = unit_of(model, "random", (torch.randn(2, 4), torch.tensor([0, 1])))
    assert not recorder.signals.noise.random
    assert any("initial weights are all alike" in note for note in recorder.signals.notes())
