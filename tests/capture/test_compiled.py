"""What compiled code hands over, against explicit gradients of single rows; and when it is compiled anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ine_callback.capture import Capture
from ine_callback.capture.compiled import Tap, forget_compiled

ROWS, SIDE = 5, 6


class Network(nn.Module):
    """Several layer types, positions, in-place activations, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.twice = nn.Embedding(9, SIDE), nn.LayerNorm(SIDE), nn.Linear(SIDE, SIDE)
        self.rms, self.conv = nn.RMSNorm(SIDE), nn.Conv1d(SIDE, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = self.rms(self.twice(torch.relu_(self.twice(x))))
        return self.head(torch.tanh_(self.conv(x.transpose(1, 2))).mean(2))


class Flat(nn.Module):
    """Rows and positions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(SIDE), nn.Linear(SIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x.flatten(0, 1))).view(len(x), -1, 3).sum(1)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(SIDE, SIDE), nn.LayerNorm(SIDE), nn.Tanh()), nn.Linear(SIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False)).sum(1)


def ids() -> Tensor:
    return torch.randint(9, (ROWS, 4))


def series() -> Tensor:
    return torch.randn(ROWS, 4, SIDE)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    for watched in Watched.made:
        watched.capture.detach()
    Watched.made.clear()
    torch.compiler.reset()


class Watched:
    """The per-sample gradients that a capture got, by the parameters' names."""

    made: ClassVar[list[Watched]] = []

    def __init__(self, module: nn.Module, rows: int = ROWS) -> None:
        self.names = {p: name for name, p in module.named_parameters()}
        self.gradients: dict[str, Tensor] = {}
        self.capture = Capture(module, self.receive, pytest.fail)
        self.capture.attach(fresh=False)
        self.capture.start_batch(rows)
        self.made.append(self)

    def receive(self, module: nn.Module, found: dict[str, Any]) -> None:
        for name, grad_sample in found.items():
            parameter = module._parameters[name]
            one = grad_sample.wide().gradient(slice(None)).reshape(-1, *parameter.shape).clone()
            key = self.names[parameter]
            self.gradients[key] = self.gradients[key] + one if key in self.gradients else one


def by_hand(module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    rows = [torch.autograd.grad(loss(module(row)), [*module.parameters()]) for row in x.split(1)]
    names = [name for name, _ in module.named_parameters()]
    return {name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


def loss(out: Tensor) -> Tensor:
    return out.square().sum()


LONG = [pytest.param(backend, marks=pytest.mark.long) for backend in ("aot_eager", "inductor")]


@pytest.mark.parametrize("backend", ["eager", *LONG])
@pytest.mark.parametrize(("kind", "draw"), [(Network, ids), (Flat, series), (Recomputed, series)])
def test_gradients_are_those_of_single_rows(kind: type[nn.Module], draw: Callable[[], Tensor], backend: str) -> None:
    module, x = kind().double(), draw()
    x = x.double() if x.is_floating_point() else x
    expected, watched = by_hand(module, x, loss), Watched(module)
    loss(torch.compile(module, backend=backend, fullgraph=True)(x)).backward()
    assert watched.gradients.keys() == expected.keys()
    for name, gradients in expected.items():
        torch.testing.assert_close(watched.gradients[name], gradients, rtol=1e-10, atol=1e-12, msg=name)


def test_what_was_compiled_before_is_compiled_anew() -> None:
    module, x = Network(), ids()
    run = torch.compile(module, backend="aot_eager")
    loss(run(x)).backward()
    watched = Watched(module)
    loss(run(x)).backward()
    assert set(watched.gradients) == set(watched.names.values())


def test_a_second_recording_hears_and_the_first_does_not() -> None:
    module, x = Network(), ids()
    run = torch.compile(module, backend="aot_eager")
    first = Watched(module)
    loss(run(x)).backward()
    first.capture.detach()
    before = {name: g.clone() for name, g in first.gradients.items()}
    second = Watched(module)
    loss(run(x)).backward()
    assert all(torch.equal(before[name], g) for name, g in first.gradients.items())
    assert all(torch.equal(before[name], g) for name, g in second.gradients.items())
    assert second.gradients.keys() == before.keys()


class Stack(nn.Module):
    """Blocks of one class, each compiled by itself: the compiler makes one graph for all."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(SIDE), nn.Linear(SIDE, SIDE)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


def test_blocks_of_one_class_share_a_graph_and_keep_their_gradients() -> None:
    module, x = Stack(12).double(), series().double()
    expected, watched = by_hand(module, x, loss), Watched(module)
    for block in module.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss(module(x)).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2  # the first block's input is a leaf
    for name, gradients in expected.items():
        torch.testing.assert_close(watched.gradients[name], gradients, rtol=1e-10, atol=1e-12, msg=name)


def test_a_twin_that_is_not_recorded_does_not_take_the_graph() -> None:
    module, twin, x = Stack(1), Stack(1), series()
    watched = Watched(module)
    for each in (twin, module):
        each.compile(backend="aot_eager")
        loss(each(x)).backward()
    assert set(watched.gradients) == set(watched.names.values())
    assert not torch._dynamo.config.skip_nnmodule_hook_guards
    watched.capture.detach()
    assert torch._dynamo.config.skip_nnmodule_hook_guards


def test_layers_that_do_not_train_stay_without_gradient() -> None:
    module = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, 3)).requires_grad_(False)
    watched = Watched(module)
    run = torch.compile(module, backend="aot_eager")
    assert not run(torch.randn(ROWS, SIDE)).requires_grad
    module[2].requires_grad_(True)  # a layer that thaws
    loss(run(torch.randn(ROWS, SIDE))).backward()
    assert set(watched.gradients) == {"2.weight", "2.bias"}


def test_a_paused_capture_takes_nothing() -> None:
    module, x = Network(), ids()
    watched, run = Watched(module), torch.compile(module, backend="aot_eager")
    with watched.capture.paused():
        loss(run(x)).backward()
    assert not watched.gradients


def test_a_refresh_or_a_smaller_batch_recompiles_once_at_most() -> None:
    module, x = Network(), ids()
    watched, run = Watched(module), torch.compile(module, backend="aot_eager")
    compiled = torch._dynamo.utils.counters["stats"]
    loss(run(x)).backward()
    at_first = compiled["unique_graphs"]
    for _ in range(3):
        watched.capture.start_batch(ROWS)
        loss(run(x)).backward()
    assert compiled["unique_graphs"] == at_first
    for rows in (3, 4, 2):
        watched.capture.start_batch(rows)
        loss(run(x[:rows])).backward()
    assert compiled["unique_graphs"] == at_first + 1


def test_a_norm_of_flattened_rows_needs_whole_rows() -> None:
    module, x = Flat(), series()
    watched = Watched(module, rows=3)
    watched.capture._fail = lambda error: None
    loss(torch.compile(module, backend="aot_eager")(x)).backward()
    assert not watched.gradients


def test_cuda_graphs_leave_the_operation_out() -> None:
    tags = torch.ops.ine_callback.receive.default.tags
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    assert torch.Tag.cudagraph_unsafe in tags


def test_without_the_compiler_nothing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ine_callback.capture.compiled.sys.modules", {})
    forget_compiled()


def test_a_tap_without_a_receiver_is_silent() -> None:
    layer = nn.Linear(SIDE, 3)
    tap = Tap(layer, lambda *_: None, lambda *_: pytest.fail("received"), pytest.fail)
    leaf = tap._leaf
    del tap
    assert torch.ops.ine_callback.receive([torch.ones(2, 3)], leaf).tolist() == [0.0]
