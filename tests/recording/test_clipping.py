"""Gradients count as they are when the step is taken, whoever changes them: clipping wherever and however it is done.

Every case trains with and without us, bit by bit the same, and its signals are those of a loop over rows in float64
whose gradients are changed as the case changes them.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from ine_callback import InfluenceCallback
from tests.helpers.changed_gradients import Changed, Gradients, Net, bare, by_norm, by_rows, fit, recorded, same


def by_layer(grads: Gradients) -> Gradients:
    return [*by_norm(grads[:2], 0.02), *by_norm(grads[2:], 0.3)]


def turned(grads: Gradients) -> Gradients:
    return [g * -0.5 for g in grads]


def without_first(grads: Gradients) -> Gradients:
    return [torch.zeros_like(g) for g in grads[:2]] + grads[2:]


class InConfigure(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.change(by_norm)


class OwnClip(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class BeforeStep(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.change(by_norm)


class ThroughData(Net):
    """``grad.data`` hides a change from the tensor's version."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p, g in zip(self.parameters(), by_norm([p.grad for p in self.parameters()]), strict=True):
            p.grad.data.copy_(g)


class Replaced(Net):
    def on_after_backward(self) -> None:
        for p, g in zip(self.parameters(), turned([p.grad for p in self.parameters()]), strict=True):
            p.grad = g


class ByLayer(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.change(by_layer)


class Frozen(Net):
    """The first layer's gradients are removed."""

    def on_after_backward(self) -> None:
        self.net[0].zero_grad(set_to_none=True)


class Zeroed(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.net[0].zero_grad(set_to_none=False)


class InStep(Net):
    """Clipped in an ``optimizer_step`` of its own."""

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        self.change(by_norm)
        optimizer.step()


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()


class InCallback(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)


class AfterBackward(L.Callback):
    """Before ours in the list: it changes gradients before our own hook sees them."""

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        module.change(by_norm)


CASES: dict[str, tuple[type[Net], Changed, list[L.Callback], dict[str, Any]]] = {
    "Trainer(gradient_clip_val)": (Net, by_norm, [], {"gradient_clip_val": 0.05}),
    "configure_gradient_clipping, own code": (InConfigure, by_norm, [], {}),
    "configure_gradient_clipping, clip_gradients": (OwnClip, by_norm, [], {}),
    "on_before_optimizer_step": (BeforeStep, by_norm, [], {}),
    "on_before_optimizer_step of a callback": (Net, by_norm, [InCallback()], {}),
    "on_after_backward of a callback": (Net, by_norm, [AfterBackward()], {}),
    "grad.data": (ThroughData, by_norm, [], {}),
    "replaced and turned round": (Replaced, turned, [], {}),
    "a factor for each layer": (ByLayer, by_layer, [], {}),
    "a layer's gradients removed": (Frozen, without_first, [], {}),
    "a layer's gradients zeroed": (Zeroed, without_first, [], {}),
    "optimizer_step": (InStep, by_norm, [], {}),
    "manual optimisation": (ByHand, by_norm, [], {}),
    "not at all": (Net, list, [], {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_whoever_changes_the_gradients(name: str) -> None:
    kind, changed, callbacks, options = CASES[name]
    keep, influence = recorded(kind, callbacks=callbacks, **options)
    tolerance = {"rtol": 1e-4, "atol": 1e-9} if "clip_gradients" in name or "val" in name or "callback" in name else {}
    tolerance = {"rtol": 1e-4, "atol": 1e-9} if name == "manual optimisation" else tolerance  # torch adds 1e-6 to norms
    same(keep, by_rows(kind, changed), **tolerance)
    assert influence._recorder is not None and not influence._recorder.failed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [BeforeStep, ByLayer, Frozen])
def test_with_accumulation(kind: type[Net]) -> None:
    changed = {BeforeStep: by_norm, ByLayer: by_layer, Frozen: without_first}[kind]
    keep, _ = recorded(kind, accumulate_grad_batches=2)
    same(keep, by_rows(kind, changed, accumulate=2))


class Noisy(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad.add_(torch.randn_like(p), alpha=0.1)


class ByValue(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_value_(self.parameters(), 0.01)


class Centred(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for layer in (self.net[0], self.net[2]):
            layer.weight.grad.sub_(layer.weight.grad.mean(1, keepdim=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Noisy, ByValue, Centred])
def test_what_is_no_factor_is_named(kind: type[Net]) -> None:
    influence = InfluenceCallback(["val", "self"])
    fit(kind, influence)
    assert influence.report is not None
    assert any("more than a factor for each parameter" in note for note in influence.report.run.notes)


@pytest.mark.filterwarnings("ignore")
def test_noise_leaves_the_rows_shares() -> None:
    """Added noise is no row's: what is left in the gradient's own direction counts, about 1, not the norm's 3."""
    keep, _ = recorded(Noisy)
    truth = by_rows(Net, list)
    slope = float((keep.steps[0][1] * truth[0]).sum() / truth[0].square().sum())
    assert 0.3 < slope < 1.7


def test_several_factors_are_named_and_one_is_not() -> None:
    for kind, told in ((ByLayer, True), (BeforeStep, False), (Net, False)):
        influence = InfluenceCallback("val")
        fit(kind, influence)
        assert influence.report is not None
        assert any("not clipped by one factor" in note for note in influence.report.run.notes) == told


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Net, BeforeStep])
def test_loss_scaling_is_no_clipping(kind: type[Net]) -> None:
    def scaled() -> dict[str, Any]:
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}

    (keep, _), (other, _) = recorded(kind, **scaled()), recorded(kind)
    for (_, one, _), (_, two, _) in zip(keep.steps, other.steps, strict=True):
        assert float((one - two).norm() / two.norm()) < 0.05  # half precision


def test_a_change_that_nobody_expected_is_left_out_and_measured_from_then_on(monkeypatch: Any) -> None:
    """The first such step cannot be right: it is dropped and named."""
    monkeypatch.setattr("ine_callback.integrations.callback.touches_gradients", lambda *_: False)
    keep, influence = recorded(BeforeStep)
    found, truth = keep.steps, by_rows(BeforeStep, by_norm)
    assert len(found) == len(truth) - 1
    for (_, signals, _), expected in zip(found[1:], truth[2:], strict=True):  # found[0] has the direction of step 0
        torch.testing.assert_close(signals, expected, rtol=1e-7, atol=1e-12)
    assert any("step 0 is left out" in note for note in influence._recorder.notes)  # type: ignore[union-attr]


# -- bare loops --------------------------------------------------------------------------------------------------------


def clip_inside(module: Net, optimizer: Any, once: Any) -> None:
    once()
    module.change(by_norm)
    optimizer.step()
    optimizer.zero_grad()


def clip_in_closure(module: Net, optimizer: Any, once: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = once()
        module.change(by_norm)
        return loss

    optimizer.step(closure)


def clip_data(module: Net, optimizer: Any, once: Any) -> None:
    once()
    for p, g in zip(module.parameters(), by_norm([p.grad for p in module.parameters()]), strict=True):
        p.grad.data.copy_(g)
    optimizer.step()
    module.zero_grad(set_to_none=False)


def scaled_loss(module: Net, optimizer: Any, once: Any) -> None:
    """Scaled and unscaled by hand, as a GradScaler does it."""
    once()
    module.change(lambda grads: [g * 512 for g in grads])
    module.change(lambda grads: by_norm([g / 512 for g in grads]))
    optimizer.step()
    optimizer.zero_grad()


def hooked(parameters: Any) -> torch.optim.Optimizer:
    """A hook on the optimizer clips."""
    own = list(parameters)
    optimizer = torch.optim.SGD(own, lr=0.2)

    def clip(*_: Any) -> None:
        for p, g in zip(own, by_norm([p.grad for p in own]), strict=True):
            p.grad.copy_(g)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def plain(module: Net, optimizer: Any, once: Any) -> None:
    once()
    optimizer.step()
    optimizer.zero_grad()


def test_a_hook_on_the_optimizer() -> None:
    keep, _, _ = bare(plain, hooked)
    same(keep, by_rows(Net, by_norm))


@pytest.mark.parametrize("step", [clip_inside, clip_in_closure, clip_data, scaled_loss])
def test_bare_loops_need_say_nothing(step: Any) -> None:
    keep, _, _ = bare(step)
    same(keep, by_rows(Net, by_norm))


def test_a_step_without_gradients_is_none() -> None:
    def step(module: Net, optimizer: Any, once: Any) -> None:
        once()
        optimizer.zero_grad()
        optimizer.step()

    keep, recorder, _ = bare(step)
    assert not keep.steps and recorder.steps == 0
