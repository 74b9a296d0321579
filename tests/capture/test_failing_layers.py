"""A layer that fails later is dropped alone from then on; what concerns all layers stops the recording."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.capture import Outer, Vector, register_layer
from ine_callback.curvature.kfac import KFAC
from ine_callback.methods import FINE
from ine_callback.scoring.directions import VectorDirection
from tests.helpers.failing_layer import Failing, around
from tests.helpers.oracle import Run, Setting, cross_entropy, run


def late(model: Callable[[], nn.Module], **options: object) -> Run:
    """Runs six steps of a model whose layer 2 fails from the fourth on."""
    return run(Setting("late", model), steps=6, uncaptured="raise", **options)


def test_a_layer_that_fails_later_is_left_out_from_then_on() -> None:
    result = late(around(lambda: Failing(3)))
    torch.manual_seed(0)
    without = late(around(lambda: Failing(3)), speed=lambda module: {module[2].factor: 0.0})
    for k, (_, signals, _) in enumerate(result.found):
        expected = result.expected[k] if k < 3 else _again(result, without, k)
        torch.testing.assert_close(signals, expected, rtol=1e-9, atol=1e-11)
    (note,) = result.recorder.coverage.notes
    assert (
        "from step 3 on" in note and "2.factor" in note and "recording it failed with ZeroDivisionError: mine" in note
    )


def _again(result: Run, without: Run, k: int) -> Tensor:
    """The expected signals of a run from the same seed that never had the layer."""
    assert torch.equal(result.rows[k], without.rows[k])
    return without.expected[k]


class TwiceFailing(nn.Module):
    """One layer called twice a batch: what the first call left must go with the second's."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner = Failing(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_layer_that_fails_between_two_calls_leaves_nothing_in_the_batch(after: int) -> None:
    """``after``: calls in backward passes until it fails, in the middle of the first, in the third or between them."""

    def model() -> nn.Module:
        return around(lambda: TwiceFailing(after))()

    without = {"speed": lambda module: {module[2].inner.factor: 0.0}, "steps": 4, "uncaptured": "warn"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(Setting("half", model), **without)
    for k, (_, signals, _) in enumerate(result.found):
        if k >= after // 2:
            torch.testing.assert_close(signals, result.expected[k], rtol=1e-9, atol=1e-11)
        else:
            assert (signals - result.expected[k]).abs().max() > 1e-6
    assert not result.recorder.failed


def test_all_parameters_of_a_layer_are_dropped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of a norm had been contracted before its shift fails."""
    contract, asked = VectorDirection.contract, []

    def breaks(self: VectorDirection, grad_sample: Vector) -> object:
        if self.block.name == "1.bias":
            asked.append(self)
            if len(asked) > 1:
                raise RuntimeError("no")
        return contract(self, grad_sample)

    monkeypatch.setattr(VectorDirection, "contract", breaks)
    model = Setting("norm", lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    result = run(model, speed=lambda module: dict.fromkeys(module[1].parameters(), 0.0))
    for (_, signals, _), expected in list(zip(result.found, result.expected, strict=True))[1:]:
        torch.testing.assert_close(signals, expected, rtol=1e-9, atol=1e-11)
    assert set(result.recorder.capture.dropped) == {"1"}


class Tied(nn.Module):
    """Two layers have a tied weight; the second one's function fails later."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Failing(10**6), Failing(2), nn.Linear(4, 3)
        self.two.factor = self.one.factor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def test_a_tied_parameter_is_dropped_with_the_layer_that_fails() -> None:
    result = run(Setting("tied", Tied), steps=4, speed=lambda module: {module.one.factor: 0.0})
    for k, (_, signals, _) in enumerate(result.found):
        close = torch.allclose(signals, result.expected[k], rtol=1e-9, atol=1e-11)
        assert close == (k >= 2)


class ChangesKind(nn.Linear):
    """Its function returns another kind of GradSample in later steps."""


@register_layer(ChangesKind)
def _changes_kind(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, object]:
    module.asked = module.__dict__.get("asked", 0) + 1
    if module.asked <= 3:
        return {"weight": Outer(activations[:, None, None], output_grads[:, None, None])}
    return {"weight": Vector((output_grads[:, :, None] * activations[:, None]).flatten(1))}


def test_another_kind_of_grad_sample_than_before_drops_the_layer_with_that_reason() -> None:
    result = run(Setting("changes kind", around(lambda: ChangesKind(4, 4, bias=False))), steps=4)
    (note,) = result.recorder.coverage.notes
    assert "2.weight" in note and "its function returned a Vector of (16,) for '2.weight'" in note
    assert "Outer of (1, 4, 4)" in note and not result.recorder.failed


# -- failures that concern more than one layer -------------------------------------------------------------------------


def recorded(model: nn.Module, steps: int = 5, **options: object) -> Recorder:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {
        "queries": {"val": (x, y), "own": "self"},
        "curvature_every": 1,
        "refresh_every": 1,
        "methods": [FINE()],
    }
    recorder = Recorder(model, optimizer, 8, loss=cross_entropy, **settings | options)
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            with recorder.batch(torch.arange(8), (x, y)):
                cross_entropy(model, (x, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recorder


class OutOfMemory(Failing):
    pass


@register_layer(OutOfMemory)
def _out_of_memory(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
    assert isinstance(module, OutOfMemory)
    module.left -= 1
    if module.left < 0:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return {"factor": activations * output_grads}


def test_a_full_device_stops_the_recording() -> None:
    recorder = recorded(around(lambda: OutOfMemory(2))())
    assert recorder.failed and recorder.steps == 2 and not recorder.capture.dropped
    assert any("CUDA out of memory" in note for note in recorder.notes)


def test_the_recording_stops_when_its_last_layer_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Failing(2), nn.Linear(4, 3)).requires_grad_(False)
    model[1].requires_grad_(True)
    recorder = recorded(model)
    assert recorder.failed and recorder.steps == 2
    assert [note for note in recorder.notes if "no layer is left to record: recording it failed" in note]


@pytest.mark.parametrize("name", ["observe", "operator"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_curvature_that_fails_drops_its_layer_alone(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    method, asked = getattr(KFAC, name), []

    def breaks(self: KFAC, block: object, *args: object, **kwargs: object) -> object:
        if block.name == "2.weight":
            asked.append(block)
            if len(asked) > after:
                raise torch.linalg.LinAlgError("linalg.eigh: the input contains non-finite elements")
        return method(self, block, *args, **kwargs)

    monkeypatch.setattr(KFAC, name, breaks)
    recorder = recorded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    assert not recorder.failed and recorder.steps == 5 and set(recorder.capture.dropped) == {"2"}
    assert [block.name for block in recorder.signals.table] == ["0.weight"]
    assert "LinAlgError: linalg.eigh" in recorder.coverage.uncaptured["2.weight"]


def test_wrong_rows_stop_the_recording() -> None:
    """If no layer's input has the announced number of rows, the rows are wrong and not the layers."""
    model, x, y = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(9, 4), torch.randint(3, (9,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, 9, "self")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with recorder:
            for rows in (4, 9):
                with recorder.batch(torch.arange(4)):
                    cross_entropy(model, (x[:rows], y[:rows])).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert any("check row_fn and the collate function" in note for note in recorder.notes)
    assert recorder.failed and not recorder.capture.dropped


class Experts(nn.Module):
    """A layer that sees as many tokens as are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.sent = 4

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.cat([self.expert(x[: self.sent]), x[self.sent :]]))


def test_a_layer_whose_rows_do_not_fit_later_is_dropped_alone() -> None:
    model = Experts()
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, 4, "self", on_error="raise")
    with recorder:
        for sent in (4, 3, 4):
            model.sent = sent
            with recorder.batch(torch.arange(4)):
                cross_entropy(model, (x, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert set(recorder.capture.dropped) == {"expert"} and recorder.steps == 3
