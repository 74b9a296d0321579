"""What joins later, or takes part in some steps only, is recorded from then on, or found and named with the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.kept_steps import BATCH, EXACT, Net, check, recorded, truth


class Joining(nn.Module):
    """Something more from the third call in training on; ``kind`` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.more, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bare = nn.Parameter(torch.ones(8))
        self.kind, self.stage = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.stage and self.kind == "layer":
            h = h + self.more(h)
        if self.stage and self.kind == "bare":
            h = h * self.bare
        if self.stage and self.kind == "borrowed":
            h = h + F.linear(h, self.more.weight)
        if self.kind == "borrowed":
            h = self.more(h)
        if self.kind == "again":
            for _ in range(1 + self.stage):
                h = torch.tanh(self.more(h))
        return self.head(h)


class Curriculum(Net):
    begins = 2

    def query(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        """Of the whole network, whatever the training is at."""
        stage, net.stage = net.stage, 1
        value = self.loss(net, x, y)
        net.stage = stage
        return value

    def training_step(self, batch: Any, index: int) -> Any:
        self.net.stage = int(index >= self.begins)
        return self.differentiate(*batch)


@pytest.mark.parametrize("kind", ["layer", "again"])
def test_a_layer_that_joins_is_recorded_from_then_on(kind: str) -> None:
    module, recorder, keep = recorded(lambda: Curriculum(Joining(kind)))
    check(module, keep)
    assert recorder.coverage.share == 1.0


def test_a_layer_that_joins_between_refreshes_is_recorded_from_then_on() -> None:
    module, recorder, keep = recorded(lambda: Curriculum(Joining("layer")), refresh_every=50, trainer={"max_epochs": 2})
    names = {"more.weight", "more.bias"}
    found = {block.name.removeprefix("net.") for block in recorder.signals.table}
    assert names <= found | {"more.bias"} and recorder.coverage.share == 1.0
    torch.testing.assert_close(keep.steps[2][1][:, 0], truth(module, 2), **EXACT)


@pytest.mark.long
def test_a_layer_that_joins_between_curvature_updates_keeps_its_discount() -> None:
    options = {"discount": True, "curvature_every": 50, "trainer": {"max_epochs": 2}}
    _, recorder, keep = recorded(lambda: Curriculum(Joining("layer")), **options)
    assert recorder.coverage.share == 1.0 and not recorder.coverage.uncaptured
    assert all(bool(signals.isfinite().all()) for _, signals, _ in keep.steps)


@pytest.mark.long
def test_a_bare_parameter_that_joins_is_named_with_its_fraction() -> None:
    module, recorder, _ = recorded(lambda: Curriculum(Joining("bare")), trainer={"max_epochs": 2})
    (name,) = recorder.coverage.uncaptured
    assert name == "net.bare" and "no layer function for Joining" in recorder.coverage.uncaptured[name]
    sizes = [p.numel() for p in module.parameters()]
    assert recorder.coverage.share == pytest.approx(1 - 8 / sum(sizes))
    assert any("net.bare" in note and "from step" in note for note in recorder.coverage.notes)


def test_a_bare_parameter_that_joins_is_recorded_by_the_fallback() -> None:
    class RecordedRows(Curriculum):
        """The fallback asks for single rows with ``batch_idx`` 0: the stage stays that of the step."""

        def training_step(self, batch: Any, index: int) -> Any:
            if len(batch[0]) == BATCH and self.training:
                self.net.stage = int(index >= self.begins)
            return self.differentiate(*batch)

    module, recorder, keep = recorded(
        lambda: RecordedRows(Joining("bare")), trainer={"max_epochs": 2}, uncaptured="fallback"
    )
    assert not recorder.coverage.uncaptured and recorder.coverage.share == 1.0
    torch.testing.assert_close(keep.steps[-1][1][:, 0], truth(module, -1), **EXACT)


def test_a_weight_borrowed_later_is_found_and_named() -> None:
    """No call changes: the verification at a later refresh finds it."""
    module, recorder, keep = recorded(lambda: Curriculum(Joining("borrowed")), trainer={"max_epochs": 1})
    told = recorder.coverage.uncaptured
    assert set(told) == {"net.more.weight", "net.more.bias"}
    assert all("from step 2 on (verified until step 1)" in why for why in told.values())
    names = {n for n, _ in module.net.named_parameters() if not n.startswith("more")}
    for step in range(4):
        torch.testing.assert_close(keep.steps[step][1][:, 0], truth(module, step, None if step < 2 else names), **EXACT)


class LayerDrop(Net):
    """Stochastic depth by the batch: in each step another set of blocks is called."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]))
        self.now: tuple[int, ...] = (0, 1, 2)

    def loss(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        for k in self.now:
            x = x + torch.tanh(net[k](x))
        return F.cross_entropy(net[3](x), y)

    def query(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        now, self.now = self.now, (0, 1, 2)
        value = self.loss(net, x, y)
        self.now = now
        return value

    def training_step(self, batch: Any, index: int) -> Any:
        self.now = self.drops[index]
        return self.differentiate(*batch)

    drops = ((0,), (1, 2), (0, 2), (0, 1, 2))


def test_layers_that_take_part_in_some_steps_only_are_exact() -> None:
    module, recorder, keep = recorded(LayerDrop)
    assert recorder.coverage.share == 1.0 and not recorder.coverage.uncaptured
    for step, drops in enumerate(module.drops):
        module.now = drops
        torch.testing.assert_close(keep.steps[step][1][:, 0], truth(module, step), **EXACT)


class Experts(nn.Module):
    """Each row goes to one of three experts, by the sign of two features; all rows are computed, as masked."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
        out = x
        for k, expert in enumerate(self.experts):
            mine = (which == k)[:, None]
            if bool(mine.any()):
                out = out + expert(x) * mine
        return self.head(torch.tanh(out))


def test_experts_without_a_row_in_the_first_batches_are_exact_later() -> None:
    module, recorder, keep = recorded(lambda: Net(Experts()))
    first, last = module.seen[0][0], torch.cat([x for x, *_ in module.seen])
    counts = [int(((x[:, 0] > 0) & (x[:, 1] > 1)).sum()) for x in (first, last)]
    assert counts[0] == 0 < counts[1]
    check(module, keep)
    assert recorder.coverage.share == 1.0
