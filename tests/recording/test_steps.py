"""What counts is what is in ``.grad`` when the step is taken: clipping wherever it is done, closures that run twice.

Every case trains with and without us, bit by bit the same, and its signals are those of a loop over rows in float64
whose gradients are changed as the case changes them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, InfluenceReport, Recorder
from ine_callback.report.html import page
from ine_callback.report.markdown import markdown
from ine_callback.report.table import as_text
from tests.helpers.oracle import Keep

ROWS, SIZE = 24, 6
QUIET: dict[str, Any] = {
    **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    **{"enable_model_summary": False, "enable_checkpointing": False},
}
Gradients = list[Tensor]
Changed = Callable[[Gradients], Gradients]
X, Y = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(ROWS) % 3


class Net(L.LightningModule):
    """Two layers, weight and bias each, in the order of ``parameters()``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.double()

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)

    def change(self, changed: Changed) -> None:
        """In place, as clipping does it."""
        for p, g in zip(self.parameters(), changed([p.grad for p in self.parameters()]), strict=True):
            p.grad.copy_(g)


def by_norm(grads: Gradients, most: float = 0.05) -> Gradients:
    factor = most / float(torch.stack([g.norm() for g in grads]).norm())
    return [g * min(1.0, factor) for g in grads]


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


def loader(size: int = SIZE) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=size)


def fit(kind: type[Net], influence: InfluenceCallback | None, batches: Any = None, **options: Any) -> Net:
    L.seed_everything(3, verbose=False)
    module, own = kind(), [] if influence is None else [influence]
    callbacks = [*options.pop("callbacks", []), *own]
    trainer = L.Trainer(**{**QUIET, **options}, callbacks=callbacks)
    trainer.fit(module, loader() if batches is None else batches, loader(ROWS))
    return module


def keeping(queries: Any = ("val", "self")) -> tuple[InfluenceCallback, Keep]:
    keep = Keep()
    options = {"discount": False, "refresh_every": 1, "rank": None, "initial_weights": "fixed"}
    return InfluenceCallback(list(queries), methods=[keep], **options), keep


def recorded(kind: type[Net], batches: Any = None, **options: Any) -> tuple[Keep, InfluenceCallback]:
    """Trains with and without us; the weights must be the same to the last bit."""
    influence, keep = keeping()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*report was lost: NotImplementedError")
        found = fit(kind, influence, batches, **options)
    plain = fit(kind, None, batches, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), found.parameters(), strict=True))
    return keep, influence


def grads_of(module: Net, batch: Any) -> Gradients:
    return [g.detach() for g in torch.autograd.grad(module.loss(batch), list(module.parameters()))]


def signals_of(v: Gradients, factors: Gradients, shares: list[Gradients], rows: int) -> Tensor:
    """Signals [b, 2] of shares whose gradients were changed by these factors."""
    val = [sum(float((a * f * g).sum()) for a, f, g in zip(v, factors, share, strict=True)) for share in shares]
    own = [rows * sum(float((f * g * g).sum()) for f, g in zip(factors, share, strict=True)) for share in shares]
    return torch.tensor([val, own]).double().T


def by_rows(kind: type[Net], changed: Changed, accumulate: int = 1, size: int = SIZE) -> list[Tensor]:
    """The loop over rows: plain SGD on the changed gradients; each step's signals."""
    L.seed_everything(3, verbose=False)
    module, expected = Net() if kind is not Net else kind(), []
    batches = [torch.arange(ROWS)[k : k + size] for k in range(0, ROWS, size)]
    for first in range(0, len(batches), accumulate):
        rows = torch.cat(batches[first : first + accumulate])
        v = grads_of(module, (X, Y))
        count = size * len(batches[first : first + accumulate])
        shares = [[g / count for g in grads_of(module, (X[k : k + 1], Y[k : k + 1]))] for k in rows.tolist()]
        grads = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
        after = changed([g.clone() for g in grads])
        factors = [(a * g).sum() / (g * g).sum() for a, g in zip(after, grads, strict=True)]
        expected.append(signals_of(v, factors, shares, count))
        with torch.no_grad():
            for p, g in zip(module.parameters(), after, strict=True):
                p.sub_(0.2 * g)
    return expected


def same(keep: Keep, expected: list[Tensor], **tolerance: float) -> None:
    assert len(keep.steps) == len(expected)
    for (_, signals, _), truth in zip(keep.steps, expected, strict=True):
        torch.testing.assert_close(signals, truth, **(tolerance or {"rtol": 1e-7, "atol": 1e-12}))


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


def bare(step: Callable[[Net, Any, Callable[[Any], Tensor]], None], make: Any = None) -> tuple[Keep, Recorder, Net]:
    """A loop of ``step(module, optimizer, pass)`` calls, ``pass`` being a forward and backward pass of the batch."""
    L.seed_everything(3, verbose=False)
    module, keep = Net(), Keep()
    optimizer = (make or (lambda p: torch.optim.SGD(p, lr=0.2)))(module.parameters())
    options: dict[str, Any] = {"discount": False, "refresh_every": 1, "rank": None, "initial_weights": "fixed"}
    recorder = Recorder(
        module,
        optimizer,
        ROWS,
        {"val": (X, Y), "self": "self"},
        lambda m, b: m.loss(b),
        [keep],
        on_error="raise",
        **options,
    )
    with recorder:
        for rows in torch.arange(ROWS).split(SIZE):
            batch = X[rows], Y[rows]

            def once(_: Any = None, batch: Any = batch) -> Tensor:
                loss = module.loss(batch)
                recorder.see(loss)
                loss.backward()
                return loss

            with recorder.batch(rows, batch):
                step(module, optimizer, once)
    return keep, recorder, module


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


# -- closures that run more than once ----------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: the step is taken with the gradient at perturbed weights."""

    def __init__(self, parameters: Any, lr: float = 0.2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        ps = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in ps]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        for p in ps:
            p.add_(p.grad, alpha=0.3 / float(norm))
        with torch.enable_grad():
            closure()
        for p, before in zip(ps, old, strict=True):
            p.copy_(before)
            p.sub_(0.2 * p.grad)
        return loss


class Sharp(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SAM(self.parameters())


class SharpInPlace(Sharp):
    """Gradients are zeroed, not removed."""

    def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class SharpClipped(Sharp):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.change(by_norm)  # once after both closures


def sharp_by_rows(summed: bool = False) -> list[Tensor]:
    """Signals of SAM's second pass at its weights; with ``summed`` those of both passes, never zeroed in between."""
    L.seed_everything(3, verbose=False)
    module, expected = Net(), []
    for rows in torch.arange(ROWS).split(SIZE):
        v = grads_of(module, (X, Y))

        def shares_at(module: Net, rows: Tensor = rows) -> list[Gradients]:
            return [[g / SIZE for g in grads_of(module, (X[k : k + 1], Y[k : k + 1]))] for k in rows.tolist()]

        first = shares_at(module)
        total = [torch.stack(parts).sum(0) for parts in zip(*first, strict=True)]
        there, norm = copy.deepcopy(module), torch.stack([g.norm() for g in total]).norm()
        with torch.no_grad():
            for p, g in zip(there.parameters(), total, strict=True):
                p.add_(g, alpha=0.3 / float(norm))
        second = shares_at(there)
        ones = [torch.ones(()) for _ in v]
        signals = signals_of(v, ones, second, SIZE)
        expected.append(signals + signals_of(v, ones, first, SIZE) if summed else signals)
        with torch.no_grad():
            for k, p in enumerate(module.parameters()):
                p.sub_(0.2 * sum(share[k] for share in second))
                if summed:
                    p.sub_(0.2 * total[k])
    return expected


@pytest.mark.filterwarnings("ignore:.*taken as plain SGD")
@pytest.mark.parametrize("kind", [Sharp, SharpInPlace])
def test_of_two_closure_calls_the_last_counts(kind: type[Net]) -> None:
    keep, influence = recorded(kind)
    same(keep, sharp_by_rows())
    losses = influence._recorder.accumulators._losses.mean()  # type: ignore[union-attr]
    assert np.isfinite(losses).all() and losses.max() < 4  # of one pass, not of two


class SharpByHand(Sharp):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@pytest.mark.filterwarnings("ignore:.*taken as plain SGD")
def test_of_two_closure_calls_by_hand_the_last_counts() -> None:
    keep, _ = recorded(SharpByHand)
    same(keep, sharp_by_rows())


@pytest.mark.filterwarnings("ignore:.*taken as plain SGD")
@pytest.mark.parametrize("how", ["removed", "zeroed", "by the module", "one by one", "kept"])
def test_of_two_closure_calls_in_a_bare_loop(how: str) -> None:
    def step(module: Net, optimizer: Any, once: Any) -> None:
        if how == "kept":
            optimizer.zero_grad()

        def closure() -> Tensor:
            if how in ("removed", "zeroed"):
                optimizer.zero_grad(set_to_none=how == "removed")
            elif how == "by the module":
                module.zero_grad()
            elif how == "one by one":
                for p in module.parameters():
                    p.grad = None
            loss: Tensor = once()
            return loss

        optimizer.step(closure)

    keep, _, _ = bare(step, SAM)
    same(keep, sharp_by_rows(summed=how == "kept"))


def test_two_passes_without_a_step_between_them() -> None:
    """The first pass's gradients are thrown away; and SAM in two calls, on whose inner optimizer the step is."""

    def step(module: Net, optimizer: Any, once: Any) -> None:
        once()
        ps, old = list(module.parameters()), [p.detach().clone() for p in module.parameters()]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        with torch.no_grad():
            for p in ps:
                p.add_(p.grad, alpha=0.3 / float(norm))
        optimizer.zero_grad()
        once()
        with torch.no_grad():
            for p, before in zip(ps, old, strict=True):
                p.copy_(before)
        optimizer.step()
        optimizer.zero_grad()

    keep, _, _ = bare(step)
    same(keep, sharp_by_rows())


class Gathered(Net):
    """Gradients gathered over two batches, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        if index % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            self.change(by_norm)
            optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_gradients_gathered_by_hand() -> None:
    keep, _ = recorded(Gathered)
    same(keep, by_rows(Net, by_norm, accumulate=2))


def test_passes_that_no_step_takes_do_not_pile_up() -> None:
    def step(module: Net, optimizer: Any, once: Any) -> None:
        once()
        optimizer.zero_grad()  # as where a scaler skips the step

    _, recorder, _ = bare(step)
    assert len(recorder._steps.pending._passes) <= 1


# -- steps of one row, and the report's first line ---------------------------------------------------------------------


def report_of(kind: type[Net], batches: Any, told: str = "", **options: Any) -> InfluenceReport:
    influence = InfluenceCallback(["val", "self"], initial_weights="fixed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(kind, influence, batches, **options)
    assert not told or any(told in str(one.message) for one in caught)
    assert influence.report is not None
    return influence.report


def in_every_view(report: InfluenceReport, words: str) -> None:
    """First of all that is said, wherever a report is read."""
    assert words in as_text(report).splitlines()[1]
    assert words in markdown(report).splitlines()[2].replace("\\", "")
    assert words in repr(report) and words in report._repr_html_()
    html = page(report)
    assert words in html and html.index(words) < html.index('class="answers"')


def test_batches_of_one_row_are_told_before_and_after() -> None:
    report = report_of(Net, loader(1), "a step has a single row")
    assert np.isnan(report.scores.mu).all()
    in_every_view(report, "No row has a score")


def test_single_rows_gathered_into_a_step_are_its_rows() -> None:
    keep, _ = recorded(Net, loader(1), accumulate_grad_batches=6)
    same(keep, by_rows(Net, list))
    report = report_of(Net, loader(1), accumulate_grad_batches=6)
    assert np.isfinite(report.scores.mu).all() and not report.run.incomplete


def test_a_last_batch_of_one_row_leaves_that_row_alone() -> None:
    """In order, the last row is alone in every epoch; shuffled, it is another one each time."""
    data = TensorDataset(X[:13], Y[:13])
    report = report_of(Net, DataLoader(data, batch_size=4), max_epochs=3)
    assert np.isfinite(report.scores.mu[:12]).all() and np.isnan(report.scores.mu[12]).all()
    mixed = report_of(Net, DataLoader(data, batch_size=4, shuffle=True), max_epochs=3)
    assert np.isfinite(mixed.scores.mu).all() and (mixed.observations == 3).all()


def test_a_batch_sampler_of_single_rows_is_told_by_the_first_step() -> None:
    sampler = [[k] for k in range(ROWS)]
    batches = DataLoader(TensorDataset(X, Y), batch_sampler=sampler)
    in_every_view(report_of(Net, batches, "a step has a single row"), "No row has a score")


class Stops(Net):
    """A batch that cannot be told apart by rows comes in the middle."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 2:
            self.trainer.callbacks[0]._recorder.guard.fail(ValueError("the roof fell in; mend it"))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_recording_that_stopped_says_so_first() -> None:
    report = report_of(Stops, loader(), "steps 0-1 of 4")
    in_every_view(report, "The scores cover steps 0-1 of 4 only")
    again = InfluenceReport.load(report.save("there"))
    assert again.run.incomplete == report.run.incomplete


class Refused(Net):
    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 0:
            self.trainer.callbacks[0]._recorder.guard.fail(ValueError("the roof fell in; mend it"))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_at_the_first_batch_says_so_first() -> None:
    in_every_view(
        report_of(Refused, loader(), "Nothing was recorded"), "Nothing was recorded: ValueError: the roof fell"
    )


class Elsewhere(Net):
    """Steps of an optimizer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hidden = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def training_step(self, batch: Any, index: int) -> None:
        self.hidden.zero_grad()
        self.manual_backward(self.loss(batch))
        self.hidden.step()


@pytest.mark.filterwarnings("ignore")
def test_steps_of_another_optimizer_are_told() -> None:
    in_every_view(report_of(Elsewhere, loader()), "Nothing was recorded: no optimizer step was taken")


def test_a_recorder_that_was_never_started_does_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, rows=4)
    with recorder.batch(torch.arange(4)):
        loss = model(torch.ones(4, 2)).square().mean()
        recorder.see(loss)
        loss.backward()
        recorder.after_backward()
    optimizer.step()
    recorder.measure_clipping()
    recorder.discard()
    recorder.stop()
    assert not recorder.recording and not recorder.running and recorder.steps == 0
