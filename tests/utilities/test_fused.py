"""Functions that are compiled on a GPU compute what they compute as they are written; here the GPU is a processor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.capture.layers import normalization
from ine_callback.capture.layers.normalization import channel_sums, norm_sums
from ine_callback.methods.fine.step import step_of
from ine_callback.optimizers import clipping
from ine_callback.utilities import fused

ROWS, COMPILE = 24, torch.compile


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything is compiled, as on a GPU; the functions that were."""
    compiled: list[str] = []

    def compiling(function: Any, **options: Any) -> Any:
        compiled.append(function.__name__)
        return COMPILE(function, backend=request.param, **options)

    torch.compiler.reset()
    monkeypatch.setattr(fused, "can_fuse", lambda *args: True)
    monkeypatch.setattr(torch, "compile", compiling)
    for one in (norm_sums, channel_sums, step_of, clipping._moments, clipping._by_block, clipping._uneven):
        monkeypatch.setattr(one, "_compiled", None)
    yield compiled
    assert not fused.failures()
    torch.compiler.reset()


def same(found: Any, expected: Any, **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_norms(on_gpu: list[str], dtype: torch.dtype) -> None:
    # what is compiled rounds nothing in between
    near = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    for rows in (6, 4, 5):  # sizes are dynamic: compiled once
        x, grads = torch.randn(2, rows, 7, 8, dtype=dtype)
        mean = x.mean((0, 2))
        same(norm_sums(x, grads, 1, 1e-5, True), norm_sums._function(x, grads, 1, 1e-5, True), **near)
        same(channel_sums(x, grads, mean), channel_sums._function(x, grads, mean), **near)
    assert on_gpu == ["norm_sums", "channel_sums"]


def test_shifts_of_a_step(on_gpu: list[str]) -> None:
    of_self = torch.tensor([False, True, False])
    for rows in (6, 4, 2):
        signals, factor = torch.randn(rows, 3), torch.rand(rows, 3)
        signals[0, 0], signals[1, 2] = torch.nan, torch.inf
        contrasts, halves = torch.randn(rows, 3, 4), torch.randn(rows, 3, 2)
        for extra in ((contrasts, halves), (None, None)):
            found = step_of(signals, factor, of_self, *extra)
            same(found, step_of._function(signals, factor, of_self, *extra))
            assert found.d[0, 0] == 0 and found.lost.tolist() == [1, 0, 1]
    assert on_gpu == ["step_of"]


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def trained() -> tuple[dict[str, Tensor], Tensor]:
    """The weights after a recorded training, and the scores."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8)),
        nn.Linear(8, 3),
    )
    x, y = torch.randn(ROWS, 3, 8), torch.randint(3, (ROWS,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    queries = {"val": (x[:4], y[:4]), "self": "self"}
    recorder = Recorder(model, optimizer, ROWS, queries, loss_of, total_steps=12, on_error="raise")
    recorder.start()
    for step in range(12):
        rows = torch.arange(5 * step, 5 * step + 5) % ROWS
        batch = x[rows], y[rows]
        with recorder.batch(rows, batch):
            loss = loss_of(model, batch)
            recorder.see(loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = torch.tensor(recorder.report().scores.mu)
    recorder.stop()
    return model.state_dict(), scores


def test_a_training_is_the_same_and_so_are_its_scores(on_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, scores = trained()
    assert sorted(on_gpu) == ["_by_block", "_moments", "_uneven", "channel_sums", "norm_sums", "step_of"]
    monkeypatch.setattr(fused, "can_fuse", lambda *args: False)
    plain, expected = trained()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("broken", ["no compiler", "at the first call"])
def test_what_cannot_be_compiled_runs_as_it_is_written(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(fused, "can_fuse", lambda *args: True)
    monkeypatch.setattr(fused, "_failures", {})
    monkeypatch.setattr(torch, "compile", failing if broken == "no compiler" else lambda *a, **k: failing)
    monkeypatch.setattr(norm_sums, "_compiled", None)
    x, grads = torch.randn(2, 4, 3, 5)
    for _ in range(2):
        same(norm_sums(x, grads, 1, 1e-5), partial(norm_sums._function, x, grads)(1, 1e-5))
    (told,) = fused.failures()
    assert f"{normalization.__name__}.norm_sums could not be compiled" in told and "triton" in told
