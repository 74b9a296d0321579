"""An ordinary recorded step asks no tensor for its value: on a GPU each such question would wait for the device.

And it adds few operations for each layer.

``tests/recording/test_cuda.py`` asks a GPU itself; here the questions are caught where there is none: operations whose
result or shape depends on values, and the ways in which Python reads a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from ine_callback import Query, Recorder
from tests.helpers.vision import Vision

ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "unique_dim"}
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
REFRESH = 8  # steps; these may ask


class Waited(AssertionError):
    """A tensor was asked for its value."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = isinstance(args, tuple) and len(args) > 1 and isinstance(args[1], (list, tuple))
        masked = name in ("index", "index_put", "index_put_") and masks and any(_is_mask(index) for index in args[1])
        if (name in ASKING or masked) and not _of_host():
            raise Waited(name)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _of_host() -> bool:
    """Whether what is asked for lies on the host: counts of steps, row numbers, losses of snapshots, sizes of packs."""
    frame = sys._getframe(1)
    while frame is not None:
        if "/ine_callback/" in frame.f_code.co_filename:
            return frame.f_code.co_filename.endswith(("/row_ids.py", "/snapshots.py"))
        if "/torch/optim/" in frame.f_code.co_filename or frame.f_code.co_filename.endswith("/nn/modules/rnn.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def nobody_waits() -> Iterator[None]:
    def refused(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if not _of_host():
                raise Waited(name)
            return method(*args, **kwargs)

        return ask

    with pytest.MonkeyPatch.context() as patch, _Operations():
        for name in READING:
            patch.setattr(Tensor, name, refused(name, getattr(Tensor, name)))
        yield


def convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]
    layers += [nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers), torch.randn(256, 3, 8, 8), torch.randint(10, (256,))


class Words(nn.Module):
    """An embedding looked up at several positions, one layer called twice, and tied weights."""

    def __init__(self, count: int = 40) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(count, 64), nn.Linear(64, 64), nn.Linear(64, count, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.mix(self.mix(self.words(ids)).relu())
        return self.out(h).transpose(1, 2)


def of_words() -> tuple[nn.Module, Tensor, Tensor]:
    return Words(), torch.randint(40, (256, 12)), torch.randint(40, (256, 12))


def of_many_words() -> tuple[nn.Module, Tensor, Tensor]:
    """So many that a row's gradient of the tied weights is not formed."""
    return Words(1200), torch.randint(1200, (256, 12)), torch.randint(1200, (256, 12))


def of_patches() -> tuple[nn.Module, Tensor, Tensor]:
    """With parameters that are read at their uses."""
    return Vision(), torch.randn(256, 5, 4), torch.randint(3, (256,))


class Recurrent(nn.Module):
    """Packed sequences in both directions, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cell, self.out = nn.LSTM(4, 6, bidirectional=True), nn.LSTMCell(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + torch.arange(len(x)) % 5
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.cell(torch.cat([*self.layer(packed)[1][0]], 1))[0])


def of_sequences() -> tuple[nn.Module, Tensor, Tensor]:
    return Recurrent(), torch.randn(256, 5, 4), torch.randint(3, (256,))


def mean_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("optimizer", "rank"),
    [
        (torch.optim.AdamW, 32),
        pytest.param(torch.optim.SGD, None, marks=pytest.mark.long),
        pytest.param(torch.optim.AdamW, None, marks=pytest.mark.long),
        pytest.param(torch.optim.SGD, 32, marks=pytest.mark.long),
    ],
    ids=["AdamW-default", "SGD-exact", "AdamW-exact", "SGD-default"],
)
@pytest.mark.parametrize("problem", [convolutional, of_words, of_many_words, of_patches, of_sequences])
def test_only_refreshes_wait(problem: Callable[[], Any], optimizer: Any, rank: int | None) -> None:
    torch.manual_seed(0)
    model, x, y = problem()
    steps = optimizer(model.parameters(), lr=1e-3)
    queries: dict[str, Any] = {"val": (x[:64], y[:64]), "self": "self"}
    if problem is convolutional:
        queries["margin"] = Query.margin((x[:8], y[:8]), per_row=True)
    recorder = Recorder(
        *(model, steps, 256, queries, mean_loss),
        **{"total_steps": 32, "refresh_every": REFRESH, "rank": rank, "on_error": "raise"},
    )
    with recorder:
        for step, rows in enumerate(torch.randperm(256).repeat(2).split(16)):
            batch = x[rows], y[rows]
            guard = nobody_waits if step % REFRESH else nullcontext
            with guard(), recorder.batch(rows, batch):
                loss = mean_loss(model, batch)
                recorder.see(loss)
                loss.backward()
            with guard():
                steps.step()
                steps.zero_grad()
    assert recorder.steps == 32 and (recorder.report().observations == 2).all()


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.masked_select(t > 0),
        lambda t: float(t.sum()),
    ],
)
def test_whoever_asks_is_caught(ask: Callable[[Tensor], Any]) -> None:
    values = torch.randn(4)
    with pytest.raises(Waited), nobody_waits():
        ask(values)


VIEWS = {"view", "t", "detach", "expand", "permute", "unsqueeze", "squeeze", "slice", "_unsafe_view", "transpose"}
VIEWS |= {"select", "alias", "promote_types", "unbind", "as_strided"}


class _Count(TorchDispatchMode):
    """Operations that are no mere views: on a GPU each is a kernel."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def operations(layers: int, norms: int, queries: dict[str, Any] | None) -> int:
    """Of an ordinary step of a network with so many layers, three steps after the third refresh."""
    torch.manual_seed(0)
    inner = [each for _ in range(layers) for each in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 64), *inner, *(nn.LayerNorm(64) for _ in range(norms)), nn.Linear(64, 4))
    x, y = torch.randn(64, 12, 8), torch.randn(64, 12, 4)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    sgd, count = torch.optim.SGD(model.parameters(), lr=1e-3), _Count()
    recorder = None
    if queries is not None:
        knobs = {"total_steps": 99, "refresh_every": REFRESH, "curvature_every": REFRESH, "reservoir": 0}
        recorder = Recorder(model, sgd, 64, queries, loss, on_error="raise", **knobs)
        recorder.start()
    for step in range(3 * REFRESH):
        rows = torch.arange(16) + 16 * (step % 4)
        batch = x[rows], y[rows]
        with (
            count if step == 2 * REFRESH + 3 else nullcontext(),
            recorder.batch(rows, batch) if recorder else nullcontext(),
        ):
            value = loss(model, batch)
            if recorder:
                recorder.see(value)
            value.backward()
        sgd.step()
        sgd.zero_grad()
    if recorder:
        recorder.stop()
    return count.made


@pytest.mark.parametrize(("asked", "linear", "norm"), [("val", 3, 6), ("self", 8, 8), ("both", 9, 10)])
def test_a_layer_adds_few_operations(asked: str, linear: int, norm: int) -> None:
    """Weight and bias of a linear layer with positions; scale and shift of a norm."""
    query = torch.randn(8, 12, 8), torch.randn(8, 12, 4)
    every: dict[str, Any] = {"val": query, "self": "self"}
    queries = every if asked == "both" else {asked: every[asked]}

    def added(layers: int, norms: int) -> int:
        return operations(layers, norms, queries) - operations(layers, norms, None)

    base = added(2, 1)
    assert (added(4, 1) - base) / 2 == linear and added(2, 2) - base == norm
