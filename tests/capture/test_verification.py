"""Verification finds layers with wrong gradients, be they the majority, and its reason names a penalty on weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import Recorder
from tests.helpers.kept_steps import ROWS, Net, check, data, mlp, recorded
from tests.helpers.oracle import TELLS


class Tripled(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * 3


class Equalized(nn.Linear):
    """StyleGAN's mapping layer: weights of unit size, scaled in the forward pass."""

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight * 0.01, self.bias * 0.01)


class ScaledStd(nn.Conv1d):
    """nfnet's convolution: the weight is standardised in the forward pass."""

    def forward(self, z: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), keepdim=True)) / (w.var((1, 2), keepdim=True) + 1e-6).sqrt()
        return F.conv1d(z, w, self.bias)


class Shift(nn.LayerNorm):
    def forward(self, z: Tensor) -> Tensor:
        return z * self.weight * 3 + self.bias * 3


def _wrong(kind: str) -> nn.Module:
    if kind == "all tripled":
        return nn.Sequential(Tripled(6, 8), nn.Tanh(), Tripled(8, 3))
    if kind == "standardised":
        convs = [nn.Unflatten(1, (1, 6)), ScaledStd(1, 4, 3), nn.Tanh(), ScaledStd(4, 4, 2), nn.Flatten()]
        return nn.Sequential(*convs, nn.Linear(12, 3))
    layers: dict[str, Callable[[int, int], nn.Module]] = {"tripled": Tripled, "equalized": Equalized}
    if kind == "shift":
        return nn.Sequential(nn.Linear(6, 8), Shift(8), nn.Tanh(), Shift(8), nn.Linear(8, 3))
    return nn.Sequential(layers[kind](6, 8), nn.Tanh(), layers[kind](8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", ["tripled", "equalized", "standardised", "shift", "all tripled"])
def test_layers_that_compute_something_else_are_read_at_their_uses_even_if_they_are_the_majority(kind: str) -> None:
    """Where saved tensors cannot be read, they are found and left out."""
    module, recorder, keep = recorded(lambda: Net(_wrong(kind)))
    names = {n for n, _ in module.net.named_parameters()}
    left = {n.removeprefix("net.") for n in recorder.coverage.uncaptured}
    assert bool(left) != TELLS
    if kind == "all tripled" and not TELLS:
        assert not keep.steps and recorder.failed and recorder.coverage.share == 0
    else:
        check(module, keep, names - left)


@pytest.mark.parametrize("clip", ["after the batch", "inside of it"])
def test_clipping_in_a_bare_loop_does_not_change_what_verification_finds(clip: str) -> None:
    """Verification reads gradients before they are clipped."""
    torch.manual_seed(0)
    net, (x, y) = nn.Sequential(Equalized(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), data()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    recorder = Recorder(net, sgd, ROWS, {"val": (x, y)}, loss, on_error="raise")
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with recorder.batch(torch.arange(ROWS), (x, y)):
            loss(net, (x, y)).backward()
            if clip == "inside of it":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
                sgd.step()
        if clip == "after the batch":
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            sgd.step()
    assert set(recorder.coverage.uncaptured) == {"0.weight", "0.bias"}


def _penalty(kind: str, net: nn.Module, x: Tensor) -> Tensor:
    weights = list(net.parameters())
    if kind == "l2":
        return 1e-1 * torch.stack([p.square().sum() for p in weights]).sum()
    if kind == "norm":
        return 1e-1 * torch.stack([p.norm() for p in weights]).sum()
    if kind == "l1":
        return 1e-1 * torch.stack([p.abs().sum() for p in weights]).sum()
    leaf = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(net(leaf).sum(), leaf, create_graph=True)
    return g.square().sum(1).mean()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("l2", "weight_decay"), ("norm", "weight_decay"), ("l1", "L1 penalty"), ("gradient", "create_graph=True")],
)
def test_the_reason_names_a_penalty_in_a_loss_that_was_not_seen(kind: str, reason: str) -> None:
    """Without the loss's graph nobody knows what else gives the weights gradients."""
    net, (x, y) = mlp().double(), data()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder(
        net, sgd, ROWS, {"val": (x, y)}, lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])
    )
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with recorder.batch(torch.arange(ROWS), (x, y)):
            (F.cross_entropy(net(x), y) + _penalty(kind, net, x)).backward()
        sgd.step()
    assert reason in recorder.notes[-1] and "recorder.see(loss)" in recorder.notes[-1]
    assert "row_fn" not in recorder.notes[-1] and "no layer with a known type" not in recorder.notes[-1]
