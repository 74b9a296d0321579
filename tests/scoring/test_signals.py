"""Signals of whole models through the recorder, against a loop over rows with a forward and backward pass each."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.errors import RowsError
from tests.helpers.oracle import (
    BY_NAME,
    EXACT,
    SETTINGS,
    Batch,
    Keep,
    PositionTable,
    Setting,
    Transformer,
    by_loop,
    check,
    cross_entropy,
    mlp,
    run,
    squares,
    summed,
)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_signals_equal_a_loop_over_rows(setting: Setting) -> None:
    result = run(setting)
    check(result)
    assert result.recorder.coverage.share == 1.0
    assert result.recorder.infos[-1].name == "self"
    assert float(torch.cat(result.expected).abs().min(0).values.max()) > 0


@pytest.mark.parametrize("name", ["mlp", "transformer", "twice", "fallback-bare"])
def test_signals_under_gradient_accumulation_equal_a_loop(name: str) -> None:
    check(run(BY_NAME[name], accumulate=2), accumulate=2)
    check(run(BY_NAME[name], accumulate=2, see=False), accumulate=2)


@pytest.mark.parametrize("name", ["mlp", "resnet", "twice", "bag", "fallback-bare"])
def test_signals_of_a_sum_reduction_equal_a_loop(name: str) -> None:
    check(run(BY_NAME[name], loss=summed, mean=False))


@pytest.mark.parametrize("name", ["mlp", "twice", "fallback-bare"])
def test_signals_of_a_sum_over_several_terms_a_row_equal_a_loop(name: str) -> None:
    """A row's own loss is the mean of its terms: its share of the sum is three times its gradient."""
    result = run(BY_NAME[name], loss=squares, mean=False)
    for expected in result.expected:
        expected[:, -1] /= 3
    check(result, tolerance={"rtol": 1e-6, "atol": 1e-9})  # the scale is read in float32


@pytest.mark.parametrize("model", [Transformer, PositionTable])
def test_signals_of_rows_with_unequal_numbers_of_terms_equal_a_loop(model: Callable[[], nn.Module]) -> None:
    """A row's share is its part of the sum over all tokens, also where it has none, captured or by the fallback."""
    net, keep = model().double(), Keep()
    ids = torch.randint(3, (4, 5))
    labels = torch.tensor([[0, 1, 2, 1, 0], [-1, 1, -1, -1, 2], [-1] * 5, [0, -1, 1, 2, 2]])

    def loss(module: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1, reduction=reduction)

    query = ids[:2], labels[:2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder(
        net, optimizer, 4, {"val": query}, loss, [keep], discount=False, uncaptured="fallback", on_error="raise"
    )
    expected = by_loop(net, lambda m, b: loss(m, b, "sum"), (ids, labels), [lambda m: loss(m, query)], 1 / 11)[:, :1]
    with recorder:
        with recorder.batch(torch.arange(4), (ids, labels)):
            value = loss(net, (ids, labels))
            recorder.see(value)
            value.backward()
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected, rtol=1e-6, atol=1e-9)
    assert keep.steps[0][1][2] == 0


def test_signals_of_a_smaller_last_batch_equal_a_loop() -> None:
    result = run(BY_NAME["transformer"], steps=8, batch_size=6)
    assert {len(rows) for rows in result.rows} == {6, 4}
    check(result)


def test_signals_of_batches_of_one_row_equal_a_loop() -> None:
    check(run(BY_NAME["mlp"], batch_size=1))


def test_parameter_groups_count_by_their_learning_rates() -> None:
    def groups(model: nn.Module) -> Any:
        return [
            {"params": model[0].parameters()},
            {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.03},
        ]

    def speed(model: nn.Module) -> dict[nn.Parameter, float]:
        return {p: 0.3 for layer in (model[2], model[4]) for p in layer.parameters()}

    # the rates are float32 beside the loss scale
    check(run(BY_NAME["mlp"], groups=groups, speed=speed), tolerance={"rtol": 1e-6, "atol": 1e-9})


def test_weight_and_bias_count_by_their_learning_rates() -> None:
    """A layer's weight and bias have one per-sample gradient, but not always one learning rate."""

    def groups(model: nn.Module) -> Any:
        weights = [p for p in model.parameters() if p.dim() > 1]
        return [{"params": weights}, {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.2}]

    check(run(BY_NAME["mlp"], groups=groups, speed=lambda model: {p: 2.0 for p in model.parameters() if p.dim() == 1}))


def test_parameters_that_the_optimizer_does_not_hold_get_no_signal() -> None:
    check(
        run(
            BY_NAME["mlp"],
            groups=lambda model: [p for n, p in model.named_parameters() if n not in ("0.weight", "0.bias", "4.bias")],
            speed=lambda model: {p: 0.0 for n, p in model.named_parameters() if n in ("0.weight", "0.bias", "4.bias")},
        )
    )


def test_directions_stay_until_the_next_refresh() -> None:
    """Between refreshes the direction is the one of the last refresh (step 0 and step 2)."""
    setting = BY_NAME["mlp"]
    result = run(setting, steps=4, refresh_every=2)
    for k in (0, 2):
        torch.testing.assert_close(result.found[k][1], result.expected[k], **EXACT)
    assert (result.found[1][1][:, :2] - result.expected[1][:, :2]).abs().max() > 1e-6
    torch.testing.assert_close(result.found[1][1][:, 2], result.expected[1][:, 2], **EXACT)


@pytest.mark.parametrize("told", [False, True])
def test_two_backward_passes_of_one_batch_add_up(told: bool) -> None:
    """Each has its own scale: a row's own gradient is met as a quarter and as three quarters of it."""
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    queries = {"val": (x, y), "self": "self"}
    options: dict[str, Any] = {"refresh_every": 1, "on_error": "raise", "discount": False}
    recorder = Recorder(model, optimizer, 4, queries, cross_entropy, [keep], **options)
    with recorder:
        for step in range(2):  # the first step is held back
            expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 0.25)
            with recorder.batch(torch.arange(4), (x, y)):
                value = cross_entropy(model, (x, y))
                for part in (0.25, 0.75):
                    loss = part * value
                    recorder.see(loss)
                    loss.backward(retain_graph=True)
                    if told:
                        recorder.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(keep.steps[step][1], expected, **EXACT)


def test_the_exact_mode_sums_bfloat16_in_float32() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(32, 3, bias=False), torch.randn(6, 40, 32), torch.randn(6, 40, 3)
    sgd, keep, seen = torch.optim.SGD(model.parameters(), lr=0.1), Keep(), {}
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        with half():
            return F.mse_loss(module(batch[0]), batch[1])

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda delta: seen.update(a=args[0].detach(), delta=delta))

    queries = {"val": (x[:3], y[:3]), "self": "self"}
    recorder = Recorder(
        *(model, sgd, 6, queries, loss, [keep]), discount=False, refresh_every=1, on_error="raise", context=half
    )
    with recorder:
        for _ in range(2):
            with recorder.batch(torch.arange(6), (x, y)):
                handle = model.register_forward_hook(watch)
                value = loss(model, (x, y))
                handle.remove()
                recorder.see(value)
                value.backward()
            (direction,) = recorder.signals._directions.values()
            sgd.step()
            sgd.zero_grad()
    assert direction.queries is not None and seen["delta"].dtype == torch.bfloat16
    share = seen["delta"].double().transpose(1, 2) @ seen["a"].double()
    signals = torch.stack([(share * direction.queries[0, 0]).sum((1, 2)), 6 * share.square().sum((1, 2))], 1)
    torch.testing.assert_close(keep.steps[1][1].double(), signals, rtol=1e-4, atol=1e-6)


def test_a_skipped_step_is_not_recorded() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(model, optimizer, 4, "self", cross_entropy, [keep], on_error="raise", discount=False)
    with recorder:
        for skip in (True, False):
            expected = by_loop(model, cross_entropy, (x, y), [], 0.25)
            with recorder.batch(torch.arange(4), (x, y)):
                cross_entropy(model, (x, y)).backward()
            if skip:
                recorder.discard()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert len(keep.steps) == 1
    torch.testing.assert_close(keep.steps[0][1], expected, **EXACT)


def test_clipping_scales_the_signals() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(model, optimizer, 4, {"val": (x, y)}, cross_entropy, [keep], on_error="raise", discount=False)
    expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 0.25)[:, :1]
    with recorder:
        with recorder.batch(torch.arange(4), (x, y)):
            cross_entropy(model, (x, y)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        recorder.measure_clipping()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 10)
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected / 10, rtol=1e-4, atol=0)


def test_loss_scaling_is_undone() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(
        model, optimizer, 4, {"val": (x, y), "self": "self"}, cross_entropy, [keep], on_error="raise", discount=False
    )
    expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 0.25)
    with recorder:
        recorder.capture.unscale = torch.tensor(1 / 1024)
        with recorder.batch(torch.arange(4), (x, y)):
            scaled = cross_entropy(model, (x, y)) * 1024
            recorder.see(scaled)
            scaled.backward()
        for p in model.parameters():
            p.grad.mul_(1 / 1024)  # as a scaler does
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*are not captured")
def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    model, x, y = mlp(), torch.randn(4, 4), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, 9, "self", cross_entropy, on_error="raise") as recorder:
        recorder.start_batch(torch.arange(3), (x, y))
        cross_entropy(model, (x, y)).backward()
        with pytest.raises(RowsError, match=r"Recorder: no layer's gradients could be told apart by .* 3 rows"):
            recorder.end_batch()


@pytest.mark.parametrize("rows", [[-1, 0], [0, 9], [[[0, 1]]], [0.5, 1.0], []])
def test_wrong_rows_are_refused(rows: Any) -> None:
    model = mlp()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), 9, "self", on_error="raise")
    with recorder, pytest.raises(RowsError, match="Recorder: row"):
        recorder.start_batch(torch.tensor(rows))


def test_recording_changes_no_weight() -> None:
    def trained(recorded: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(48, 3),
        )
        x, y = torch.randn(8, 1, 6, 6), torch.randint(3, (8,))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recorder = Recorder(
            model, optimizer, 8, {"val": (x, y), "self": "self"}, cross_entropy, refresh_every=1, on_error="raise"
        )
        context: Any = recorder if recorded else contextlib.nullcontext()
        with context:
            for rows in torch.arange(8).repeat(3).split(4):
                with recorder.batch(rows, (x[rows], y[rows])) if recorded else contextlib.nullcontext():
                    loss = cross_entropy(model, (x[rows], y[rows]))
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return copy.deepcopy(model.state_dict()), torch.rand(3)

    (plain, after), (watched, after_watched) = trained(False), trained(True)
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    assert torch.equal(after, after_watched)
