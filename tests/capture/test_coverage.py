"""What cannot be captured is found, and named with its fraction, refused or recorded by the fallback."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ine_callback import Recorder
from ine_callback.errors import CaptureError, InfluenceError
from tests.helpers.oracle import BY_NAME, TELLS, PositionTable, Setting, TimeFirst, check, cross_entropy, mlp, run

NAMED = [
    ("fallback-prelu", "1.weight"),
    ("fallback-bare", "token"),
    ("fallback-borrowed", "inner.weight"),
]


@pytest.mark.parametrize(("name", "parameter"), NAMED)
def test_warn_names_what_is_left_out_with_its_fraction(name: str, parameter: str) -> None:
    with pytest.warns(UserWarning, match=r"Recorder: .*% of the trainable parameters are not captured"):
        result = run(BY_NAME[name], uncaptured="warn")
    sizes = {n: p.numel() for n, p in result.model.named_parameters()}
    coverage = result.recorder.coverage
    assert parameter in coverage.uncaptured
    assert f"{sizes[parameter] / sum(sizes.values()):.1%}" in coverage.uncaptured[parameter]
    missing = sum(sizes[n] for n in coverage.uncaptured)
    assert coverage.share == pytest.approx(1 - missing / sum(sizes.values()))


def test_signals_are_those_of_the_captured_parameters() -> None:
    with pytest.warns(UserWarning, match="token"):
        check(run(BY_NAME["fallback-bare"], uncaptured="warn", speed=lambda model: {model.token: 0.0}))


@pytest.mark.parametrize(("name", "parameter"), NAMED)
def test_raise_raises_in_the_first_step(name: str, parameter: str) -> None:
    with pytest.raises(
        CaptureError, match=f"Recorder: .*{parameter}.*register_layer|Recorder: .*{parameter}.*Register"
    ):
        run(BY_NAME[name], uncaptured="raise")


def test_verification_finds_functional_use_beside_the_module() -> None:
    with pytest.warns(UserWarning, match="add up to something else"):
        result = run(BY_NAME["fallback-borrowed"], uncaptured="warn")
    assert set(result.recorder.coverage.uncaptured) == {"inner.weight", "inner.bias"}


@pytest.mark.parametrize(
    ("model", "setting_shape", "words", "parameter", "rows"),
    [
        (PositionTable, (5,), True, "place.weight", 5),
        (PositionTable, (4,), True, "place.weight", 8),
        (TimeFirst, (5, 4), False, "inner.weight", 5),
        (TimeFirst, (5, 4), False, "inner.weight", 4),
        (lambda: TimeFirst(flat=True), (5, 4), False, "inner.weight", 5),
        (lambda: TimeFirst(flat=True), (3, 4), False, "inner.weight", 6),
    ],
    ids=["positions", "positions-half", "time-first", "time-first-other", "time-first-flat", "time-first-flat-other"],
)
def test_layers_not_led_by_rows_are_read_at_their_uses_even_if_sizes_agree(
    model: Callable[[], nn.Module], setting_shape: tuple[int, ...], words: bool, parameter: str, rows: int
) -> None:
    torch.manual_seed(1)
    setting = Setting("row order", model, setting_shape, words=words, each_token=words, uncaptured="fallback")
    result = run(setting, batch_size=rows)
    check(result)
    assert parameter.rpartition(".")[0] in result.recorder.capture.dropped
    assert result.recorder.coverage.slow != TELLS


@pytest.mark.parametrize("model", [PositionTable, TimeFirst])
def test_layers_not_led_by_rows_are_left_out_where_their_uses_are_not_recognised(model: type[nn.Module]) -> None:
    """In a checkpoint, only autograd may read what is saved."""
    words = model is PositionTable

    class Checkpointed(model):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    setting = Setting("row order", Checkpointed, (4,) if words else (4, 4), words=words, each_token=words)
    left = {"place.weight"} if words else {"inner.weight"}
    with pytest.warns(UserWarning, match=next(iter(left))):
        result = run(setting, uncaptured="warn", speed=lambda m: {p: 0.0 for n, p in m.named_parameters() if n in left})
    assert set(result.recorder.coverage.uncaptured) == left
    check(result)


def test_without_a_loss_a_note_says_that_the_row_order_was_not_checked() -> None:
    model, x, y = mlp(), torch.randn(4, 4), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, 4, "self", on_error="raise")
    with recorder:
        with recorder.batch(torch.arange(4)):
            cross_entropy(model, (x, y)).backward()
        optimizer.step()
    assert any("order of rows" in note for note in recorder.coverage.notes)


def test_biases_whose_rows_cancel_pass_verification() -> None:
    """The gradient of a bias before BatchNorm is zero but for rounding; its rows' gradients are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 49, 2))
    x, y = torch.randn(16, 2, 5, 5), torch.randint(2, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    recorder = Recorder(model, optimizer, 16, "self", loss_of, on_error="raise")
    with recorder:
        with recorder.batch(torch.arange(16), (x, y)):
            loss_of(model, (x, y)).backward()
        assert float(model[0].bias.grad.norm()) < 1e-6
        optimizer.step()
    assert recorder.coverage.share == 1.0


def test_a_batch_missing_later_ends_the_recording_not_the_training() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 2), nn.PReLU()), torch.randn(8, 3), torch.randint(2, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    recorder = Recorder(model, optimizer, 8, "self", loss_of, uncaptured="fallback")

    def step(data: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        with recorder.batch(torch.arange(8), data):
            loss_of(model, (x, y)).backward()
        optimizer.step()

    with recorder:
        step((x, y))
        with pytest.warns(
            UserWarning, match="recording stopped after 1 steps: CaptureError: .*needs loss= and the batch"
        ):
            step(None)
    assert recorder.report().run.steps == 1


@pytest.mark.parametrize("at", [1, 3, 8])
def test_layers_that_thaw_between_curvature_updates_have_a_curvature_at_once(at: int) -> None:
    """Without one its discount was 0 / 0, which ended the recording."""
    model, x, y = mlp(), torch.randn(12, 4), torch.randint(3, (12,))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"curvature_every": 20, "refresh_every": 2, "total_steps": 12, "on_error": "raise"}
    recorder = Recorder(model, optimizer, 12, {"all": (x, y), "own": "self"}, cross_entropy, **options)
    with recorder:
        for step in range(12):
            model[0].requires_grad_(step >= at)
            with recorder.batch(torch.arange(12), (x, y)):
                cross_entropy(model, (x, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.signals.curvature is not None
    factors = recorder.signals.curvature._factors["0.weight"]
    assert factors.steps > 0 and float(factors.left.abs().sum()) > 0
    assert recorder.report().run.steps == 12 and not recorder.capture.dropped


@pytest.mark.parametrize(
    "option", [{"refresh_every": 0}, {"uncaptured": "maybe"}, {"on_error": "ignore"}, {"accumulate": 0}]
)
def test_the_recorder_checks_its_options(option: dict[str, object]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(InfluenceError, match=rf"Recorder: {next(iter(option))}="):
        Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, **option)


def test_the_layers_option_leaves_others_out_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(BY_NAME["mlp"], layers=["0"], uncaptured="raise")
    others = [p for name, p in result.model.named_parameters() if not name.startswith("0.")]
    whole = sum(p.numel() for p in result.model.parameters())
    left = sum(p.numel() for p in others)
    assert others and result.recorder.coverage.share == pytest.approx(1 - left / whole)
    assert any("layers= leaves out" in note for note in result.recorder.coverage.notes)


def test_signals_are_those_of_the_selected_layers() -> None:
    def frozen(model: nn.Module) -> dict[nn.Parameter, float]:
        return {p: 0.0 for name, p in model.named_parameters() if not name.startswith("0.")}

    check(run(BY_NAME["mlp"], layers=["0"], speed=frozen))


@pytest.mark.parametrize("layers", [["head.*"], [], "nothing"])
def test_layer_patterns_without_a_match_are_refused(layers: list[str]) -> None:
    with pytest.raises(InfluenceError, match=r"Recorder: layers=.* fits no module"):
        run(BY_NAME["mlp"], layers=layers)
