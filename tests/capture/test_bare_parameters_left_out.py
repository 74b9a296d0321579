"""Bare parameters: what is not recognised is left out by name, and odd passes count as autograd counts them."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ine_callback import Recorder
from ine_callback.queries import CallableQuery
from tests.helpers.oracle import Keep, Setting, by_loop, check, cross_entropy, opaque, run
from tests.helpers.vision import Vision, needs_saved, parameter


class Twofold(nn.Module):
    """One use that is recognised, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.shift = nn.Linear(4, 4), nn.Linear(4, 3), parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + self.shift) + opaque(self.shift))


class Similar(nn.Module):
    """Similarities of all rows: two dimensions hold the rows, and no number of them is one row's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.scale = nn.Linear(4, 4), nn.Linear(4, 3), parameter()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        return self.head(z) + 0.1 * torch.tanh(z @ z.T * self.scale).mean(1, keepdim=True)


class Sorted(nn.Module):
    """Works on the rows in another order: the table is added to a row whose place it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.shift = nn.Linear(4, 4), nn.Linear(4, 3), parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        z = torch.tanh(self.first(x))[order] + self.shift
        return self.head(torch.tanh(z)[order.argsort()])


class Regularised(nn.Module):
    """A shift of a layer's outputs."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.head, self.shift = nn.Linear(4, 4), nn.Linear(4, 3), parameter(*shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + self.shift))


class Scaled(nn.Module):
    """A scale of the outputs comes after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.scale = nn.Linear(4, 4), nn.Linear(4, 3), parameter()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))) * self.scale.exp()


@pytest.mark.parametrize("model", [Twofold, Sorted])
def test_what_is_not_recognised_is_left_out_by_name_and_the_others_stay_exact(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=": shift .*no layer function"):
        result = run(Setting("odd", model), uncaptured="warn", speed=lambda m: {m.shift: 0.0})
    assert set(result.recorder.coverage.uncaptured) == {"shift"}
    check(result)


@needs_saved
def test_a_scale_of_similarities_of_rows_is_left_out() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=": scale .*no layer function"):
        result = run(Setting("similar", Similar), uncaptured="warn")
    assert set(result.recorder.coverage.uncaptured) == {"scale"}


class Changes(Regularised):
    """From the third batch on, the shift is used otherwise than before."""

    batch = 0

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift if self.batch < 2 else self.change(self.shift)
        return self.head(torch.tanh(self.first(x) + shift))


def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """From the third batch on, there is a penalty on the shift."""
    assert isinstance(model, Changes)
    value = cross_entropy(model, batch)
    return value + model.shift.square().sum() if model.batch > 1 else value


@needs_saved
@pytest.mark.parametrize(
    ("change", "loss", "known"),
    [
        (lambda shift: shift.flip(0), cross_entropy, True),
        (lambda shift: shift, penalised, True),
        (opaque, cross_entropy, False),
    ],
    ids=["another operation", "a penalty", "one that is not recognised"],
)
def test_a_use_that_the_check_has_not_seen_costs_a_batch(
    change: Callable[[Tensor], Tensor], loss: Callable[..., Tensor], known: bool
) -> None:
    torch.manual_seed(0)
    model, x, y = Changes(change).double(), torch.randn(8, 4).double(), torch.randint(3, (8,))
    sgd, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    options = {"methods": [keep], "discount": False, "refresh_every": 1, "on_error": "raise"}
    recorder = Recorder(model, sgd, 8, {"val": CallableQuery(cross_entropy, (x, y))}, loss, **options)
    expected, speed = [], ({} if known else {model.shift: 0.0})
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model.batch in range(5):
            now = speed if model.batch > 2 else {}
            expected.append(by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 1 / 8, now))
            with recorder.batch(torch.arange(8), (x, y)):
                value = loss(model, (x, y))
                recorder.see(value)
                value.backward()
            sgd.step()
            sgd.zero_grad()
    assert list(recorder._steps.left_out.values()) == [1]
    told = recorder.coverage.uncaptured
    assert set(told) == (set() if known else {"shift"}) and (known or "_OpaqueBackward" in told["shift"])
    for (_, signals, _), right in zip(keep.steps, [*expected[:2], *expected[3:]], strict=True):
        torch.testing.assert_close(signals, right[:, :1], rtol=1e-9, atol=1e-11)


def test_two_passes_through_one_graph_count_twice_and_inner_passes_not_at_all() -> None:
    torch.manual_seed(0)
    model, x, y = Regularised(4).double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    sgd, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    options = {"methods": [keep], "discount": False, "on_error": "raise", "uncaptured": "raise"}
    recorder = Recorder(model, sgd, 4, {"val": (x, y)}, cross_entropy, **options)
    expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 2 / 4)
    with recorder:
        with recorder.batch(torch.arange(4), (x, y)):
            loss = cross_entropy(model, (x, y))
            recorder.see(loss)
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for again in (True, False):
                recorder.see(loss)
                loss.backward(retain_graph=again)
        sgd.step()
    torch.testing.assert_close(keep.steps[0][1], expected[:, :1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_breaks_no_training(reentrant: bool) -> None:
    """What is saved there can be read once, by autograd; so uses that need it are left out."""

    class Checkpointed(Vision):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_() if self.training else x
            return checkpoint(super().forward, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    left = {"gamma", "attention.in_proj_weight", "attention.out_proj.weight"}
    left |= {"token", "place", "attention.in_proj_bias", "attention.out_proj.bias"} if reentrant else set()
    weights = []
    for recorded in (True, False):
        torch.manual_seed(0)
        model, x, y = Checkpointed(), torch.randn(8, 5, 4), torch.randint(3, (8,))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = Recorder(model, sgd, 8, {"val": (x, y)}, cross_entropy, on_error="raise")
        with recorder if recorded else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                with recorder.batch(torch.arange(8), (x, y)) if recorded else contextlib.nullcontext():
                    loss = cross_entropy(model, (x, y))
                    if recorded:
                        recorder.see(loss)
                    loss.backward()
                sgd.step()
                sgd.zero_grad()
        if recorded:
            assert set(recorder.coverage.uncaptured) == left
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_gradient_that_a_hook_changes_fails_the_verification() -> None:
    def model() -> nn.Module:
        made = Regularised(4)
        made.shift.register_hook(lambda grad: 2 * grad)
        return made

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=": shift .*add up to something else"):
        result = run(Setting("hooked", model), uncaptured="warn", speed=lambda m: {m.shift: 0.0})
    check(result)
    assert not result.recorder.capture.bare.named()  # nothing is looked for any more


@needs_saved
def test_a_scale_of_the_outputs_is_not_the_last_layer() -> None:
    torch.manual_seed(0)
    recorder = run(Setting("logit scale", Scaled)).recorder
    assert {block.name for block in recorder.signals.table if block.outputs} == {"head.weight"}


def test_no_graph_is_held_after_a_batch() -> None:
    model, x, y = Regularised(4), torch.randn(4, 4), torch.randint(3, (4,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, sgd, 4, {"val": (x, y)}, cross_entropy, on_error="raise")
    with recorder:
        with recorder.batch(torch.arange(4), (x, y)):
            loss = cross_entropy(model, (x, y))
            recorder.see(loss)
            loss.backward()
            assert len(recorder.capture.bare._handles) == 1
            mark = loss.grad_fn.metadata["mark"] = nn.Module()  # lives as long as the graph
            node = weakref.ref(mark)
            del mark, loss
        assert node() is None
        sgd.step()


def test_without_the_loss_bare_parameters_are_left_out() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=": shift "):
        result = run(
            Setting("unseen", lambda: Regularised(4)), see=False, uncaptured="warn", speed=lambda m: {m.shift: 0.0}
        )
    assert set(result.recorder.coverage.uncaptured) == {"shift"}
    check(result)


def test_the_layers_option_selects_bare_parameters_by_their_module() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Regularised(4), parameter(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other

    torch.manual_seed(0)
    result = run(Setting("nested", Nested), layers=["one", "one.*"], uncaptured="warn", speed=lambda m: {m.other: 0.0})
    assert [*result.recorder.capture.bare.named()] == ["one.shift"]
    check(result)
