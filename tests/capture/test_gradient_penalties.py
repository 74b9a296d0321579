"""Gradients inside of the loss (create_graph=True): a row's contribution holds what the layers' derivatives give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import CallableQuery, Recorder
from tests.helpers.kept_steps import BATCH, EXACT, Net, data, recorded
from tests.helpers.oracle import Keep
from tests.helpers.vision import needs_saved

pytestmark = needs_saved


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.SiLU(), nn.Linear(5, 3))


def _norms() -> nn.Module:
    layers = nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, 3)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), *layers, nn.Flatten(), nn.Linear(9, 3))


def _convolutions() -> nn.Module:
    one, two = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 4, 3, stride=2, groups=2, bias=False)
    layers = one, nn.GroupNorm(2, 4), nn.Tanh(), two, nn.SiLU(), nn.ConvTranspose1d(4, 3, 2, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *layers, nn.Flatten(), nn.Linear(3, 3))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "norms": _norms, "convolutions": _convolutions}


def _gradient(net: nn.Module, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(of(net(leaf)), leaf, create_graph=True)
    return g


def _r1(net: nn.Module, x: Tensor) -> Tensor:
    return _gradient(net, x, torch.sum).square().sum(1).mean()


def _lipschitz(net: nn.Module, x: Tensor) -> Tensor:
    return (_gradient(net, x, lambda out: out.square().sum()).norm(dim=1) - 1).square().mean()


def _jacobian(net: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([_gradient(net, x, lambda out, k=k: out[:, k].sum()).square().sum(1) for k in range(3)]).mean()


def _consistency(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - net(x + 0.1).detach()).square().sum(1).mean()


TERMS = {"r1": _r1, "lipschitz": _lipschitz, "jacobian": _jacobian, "consistency": _consistency}


class Regular(Net):
    """Cross entropy with such a term, from one step on; ``weights``: whether with a penalty on weights, too."""

    first, weights = 0, False

    def __init__(self, term: Callable[[nn.Module, Tensor], Tensor], make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        super().__init__(make())
        self.term = term
        self.here = self.first

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(net(x), y)
        return value + self.term(net, x) if self.here else value

    def query(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    def training_step(self, batch: Any, index: int) -> Any:
        self.here = index >= self.first
        value = self.differentiate(*batch)
        return value + 0.1 * sum(p.square().sum() for p in self.net.parameters()) if self.weights else value


def check_rows(module: Regular, keep: Keep) -> None:
    """Signals of the query and of self-influence against a pass a row."""
    assert len(keep.steps) == 4
    for step, (_, signals, _) in enumerate(keep.steps):
        x, y, net = module.seen[step]
        module.here = step >= module.first
        parameters = list(net.parameters())
        v = torch.autograd.grad(module.query(net, *data()), parameters)
        for row in range(BATCH):
            loss = module.loss(net, x[row : row + 1], y[row : row + 1]) / BATCH
            g = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = [(a, b) for a, b in zip(v, g, strict=True) if b is not None]
            torch.testing.assert_close(signals[row, 0], sum((a * b).sum() for a, b in pairs), **EXACT)
            torch.testing.assert_close(signals[row, 1], BATCH * sum(b.square().sum() for _, b in pairs), **EXACT)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("net", NETS)
def test_a_row_s_contribution_is_that_of_its_whole_loss(net: str, kind: str) -> None:
    module, recorder, keep = recorded(lambda: Regular(TERMS[kind], NETS[net]), queries=["val", "self"])
    assert recorder.coverage.share == 1.0, recorder.coverage.uncaptured
    check_rows(module, keep)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("net", NETS)
def test_it_may_begin_later_where_weight_and_bias_share_a_block(net: str, first: int) -> None:
    def make() -> Net:
        module = Regular(_r1, NETS[net])
        module.first = first
        return module

    module, recorder, keep = recorded(make, queries=["val", "self"])
    assert recorder.coverage.share == 1.0, recorder.coverage.uncaptured
    check_rows(module, keep)


class Residual(Regular):
    """A differential equation: the output and its second derivative, of one call of the network."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        u = net(leaf)[:, 0]
        (first,) = torch.autograd.grad(u.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), leaf, create_graph=True)
        return (second[:, 0] + u - y).square().mean()


@pytest.mark.parametrize("discount", [False, True])
def test_a_call_that_inner_passes_go_through_shares_its_block_with_its_derivative(discount: bool) -> None:
    """The inner passes do not count, the call does: two blocks of one weight have had one curvature."""
    module, recorder, keep = recorded(lambda: Residual(_r1, _mlp), queries=["val", "self"], discount=discount)
    assert recorder.coverage.share == 1.0 and not recorder.capture.dropped, recorder.capture.dropped
    if not discount:
        check_rows(module, keep)


def test_beside_a_penalty_on_weights() -> None:
    def make() -> Net:
        module = Regular(_r1, _norms)
        module.weights = True
        return module

    module, recorder, keep = recorded(make, queries=["val", "self"])
    assert recorder.coverage.share == 1.0, recorder.coverage.uncaptured
    check_rows(module, keep)
    assert any("belong to no row" in note for note in recorder.coverage.notes)


def test_the_last_layer_is_the_network_s_own() -> None:
    """The penalty's layers come before it in the backward pass."""
    _, recorder, _ = recorded(lambda: Regular(_r1, _mlp))
    assert {block.name for block in recorder.signals.table if block.outputs} == {"net.4.weight"}


def test_the_derivative_of_batch_norm_is_left_out_by_name() -> None:
    def make() -> Net:
        return Regular(_r1, lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)))

    _, recorder, keep = recorded(make)
    assert {name.removeprefix("net.") for name in recorder.coverage.uncaptured} == {"1.weight"}
    assert "create_graph=True" in recorder.coverage.uncaptured["net.1.weight"] and len(keep.steps) == 4


def test_a_critic_that_is_trained_by_hand() -> None:
    """As in a GAN: nothing can be run again, so the rows are where the layers have them."""
    torch.manual_seed(0)
    net, (x, y) = _norms().double(), data()
    sgd, keep = torch.optim.SGD(net.parameters(), lr=0.1), Keep()
    query = CallableQuery(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), (x, y))
    options = {"methods": [keep], "discount": False, "rank": None, "on_error": "raise", "uncaptured": "raise"}
    recorder = Recorder(net, sgd, len(x), {"all": query}, None, **options)
    v = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    truth = []
    for row in range(6):
        loss = (F.cross_entropy(net(x[[row]]), y[[row]]) + _r1(net, x[[row]])) / 6
        g = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        truth.append(sum((a * b).sum() for a, b in zip(v, g, strict=True) if b is not None))
    with recorder:
        with recorder.batch(torch.arange(6)):
            loss = F.cross_entropy(net(x[:6]), y[:6]) + _r1(net, x[:6])
            recorder.see(loss)
            loss.backward()
        sgd.step()
    torch.testing.assert_close(keep.steps[0][1][:, 0], torch.stack(truth), **EXACT)
