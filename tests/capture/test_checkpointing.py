"""Activation checkpointing and offloading still save memory, and a recording that fails breaks neither."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ine_callback import FINE, Recorder

ROWS, BATCH, WIDTH = 96, 24, 200
Way = Callable[[nn.Module, Tensor], Tensor]


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def offloaded(block: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return block(x)


class Net(nn.Module):
    """Six blocks, two of them the same one, each run in some way."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8)) for _ in range(5)]
        self.blocks, self.out, self.way = nn.ModuleList([*blocks, blocks[0]]), nn.Linear(8, 2), way

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.way(block, x)
        return self.out(x)


def mean_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def live() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are inspected
        found = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def train(
    way: Way, capture: bool, broken: Callable[[Recorder], None] | None = None, count: Callable[[], int] = lambda: 0
) -> tuple[Net, Any, list[int]]:
    """The network, the report and what each forward pass left alive, by ``count``."""
    torch.manual_seed(0)
    model = Net(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(ROWS, 8), torch.randint(2, (ROWS,))
    recorder = Recorder(
        *(model, optimizer, ROWS, {"val": (x[:8], y[:8]), "self": "self"}, mean_loss, [FINE(closing=False)]),
        **{"total_steps": 8, "reservoir": 0, "on_error": "warn" if broken else "raise"},
    )
    alive = []
    with recorder if capture else contextlib.nullcontext():
        for step, rows in enumerate(torch.arange(ROWS).repeat(2).split(BATCH)):
            if broken and step == 2:
                broken(recorder)
            batch = x[rows], y[rows]
            with recorder.batch(rows, batch) if capture else contextlib.nullcontext():
                before = count()
                loss = mean_loss(model, batch)
                alive.append(count() - before)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    return model, recorder.report() if capture else None, alive


@pytest.mark.parametrize("way", [plainly, checkpointed])
def test_the_forward_pass_holds_no_more_than_without_us(way: Way) -> None:
    gc.collect()
    gc.freeze()  # `live` goes through what these trainings make, not through all that this process has imported
    try:
        _, _, recorded = train(way, capture=True, count=live)
        _, _, plain = train(way, capture=False, count=live)
    finally:
        gc.unfreeze()
    assert all(abs(ours - theirs) < 5_000 for ours, theirs in zip(recorded, plain, strict=True))
    inner = 4 * BATCH * WIDTH  # bytes of one layer's input
    assert (max(plain) > 6 * inner) == (way is plainly)


@pytest.mark.parametrize("way", [checkpointed, offloaded])
def test_scores_equal_those_of_the_plain_pass(way: Way) -> None:
    ours, plain = train(way, capture=True)[1].scores, train(plainly, capture=True)[1].scores
    # gradients vanish through six blocks without a shortcut: single precision once made NaN of their covariances
    assert np.isfinite(plain.mu).all()
    np.testing.assert_allclose(ours.mu, plain.mu, rtol=1e-3, atol=1e-3 * np.abs(plain.mu).max())


def _second_layer(recorder: Recorder) -> nn.Module:
    return next(child for child, name in recorder.capture.names.items() if name == "blocks.4.2")


def _fails(recorder: Recorder) -> None:
    """In the middle of a backward pass, between two blocks that are still to be recomputed."""
    last, receive = _second_layer(recorder), recorder.capture.receive

    def failing(module: nn.Module, grad_samples: Any) -> None:
        if module is last:
            raise RuntimeError("no")
        receive(module, grad_samples)

    recorder.capture.receive = failing


def _drops(recorder: Recorder) -> None:
    """A layer leaves the recording between two calls of it."""
    reused = next(child for child, name in recorder.capture.names.items() if name == "blocks.0.0")
    receive = recorder.capture.receive

    def dropping(module: nn.Module, grad_samples: Any) -> None:
        if module is reused and module in recorder.capture.names:
            recorder.capture.drop(module, "for the test")
        receive(module, grad_samples)

    recorder.capture.receive = dropping


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [checkpointed, offloaded])
@pytest.mark.parametrize("broken", [_fails, _drops])
def test_a_recording_that_breaks_in_a_backward_pass_breaks_no_recomputation(way: Way, broken: Any) -> None:
    recorded, plain = train(way, capture=True, broken=broken)[0], train(way, capture=False)[0]
    for ours, theirs in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
