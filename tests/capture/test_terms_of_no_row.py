"""Penalties on weights belong to no row: rows count with their own losses alone, and the sums are still verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import IF, InfluenceCallback
from tests.helpers.kept_steps import BATCH, EXACT, ROWS, Net, check, data, fit, recorded
from tests.helpers.oracle import opaque


def _normed() -> nn.Module:
    """With biases that are zero at first, so that their penalty begins in the second step."""
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def _orthogonality(net: nn.Module) -> Tensor:
    weights = [w for w in net.parameters() if w.dim() == 2]
    return torch.stack([(w @ w.T - torch.eye(len(w)).to(w)).square().sum() for w in weights]).sum()


ANCHOR = torch.linspace(-1, 1, 2000, dtype=torch.float64)  # weights of an earlier training, and how much each matters


def _towards_earlier(net: nn.Module) -> Tensor:
    anchors = [ANCHOR[: p.numel()].view_as(p) for p in net.parameters()]
    parts = [(a.abs() * (p - a).square()).sum() for p, a in zip(net.parameters(), anchors, strict=True)]
    return torch.stack(parts).sum()


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "squares": lambda net: torch.stack([p.square().sum() for p in net.parameters()]).sum(),
    "norms": lambda net: torch.stack([p.norm() for p in net.parameters()]).sum(),
    "absolute": lambda net: torch.stack([p.abs().sum() for p in net.parameters()]).sum(),
    "products": lambda net: torch.stack([(p * p).mean() for p in net.parameters()]).mean(),
    "orthogonality": _orthogonality,
    "towards earlier weights": _towards_earlier,
    "largest singular value": lambda net: torch.stack(
        [torch.linalg.svdvals(w)[0] for w in net.parameters() if w.dim() == 2]
    ).sum(),
}


class Penalised(Net):
    """Cross entropy and a penalty, from one step on."""

    first = 0

    def __init__(self, penalty: Callable[[nn.Module], Tensor], make: Callable[[], nn.Module] = _normed) -> None:
        torch.manual_seed(0)
        super().__init__(make())
        self.penalty = penalty

    def training_step(self, batch: Any, index: int) -> Any:
        value = self.differentiate(*batch)
        return value + 0.1 * self.penalty(self.net) if index >= self.first else value


@pytest.mark.parametrize("kind", PENALTIES)
def test_rows_count_with_their_own_losses(kind: str) -> None:
    module, recorder, keep = recorded(lambda: Penalised(PENALTIES[kind]))
    assert recorder.coverage.share == 1.0 and not recorder.failed
    check(module, keep)
    assert any("belong to no row" in note for note in recorder.coverage.notes)


@pytest.mark.parametrize("first", [1, 2])
def test_a_penalty_may_begin_later(first: int) -> None:
    def make() -> Net:
        net = Penalised(PENALTIES["squares"])
        net.first = first
        return net

    module, recorder, keep = recorded(make)
    assert recorder.coverage.share == 1.0
    check(module, keep)


def test_losses_and_self_influence_are_those_of_the_data() -> None:
    module, recorder, keep = recorded(lambda: Penalised(PENALTIES["squares"]), queries="self")
    for step, (_, signals, _) in enumerate(keep.steps):
        x, y, net = module.seen[step]
        for row in range(BATCH):
            g = torch.autograd.grad(F.cross_entropy(net(x[[row]]), y[[row]]), list(net.parameters()))
            truth = sum(part.square().sum() for part in g) / BATCH
            torch.testing.assert_close(signals[row, 0], truth, **EXACT)
    assert not any("no standard form" in note for note in recorder.notes)
    assert torch.as_tensor(recorder.accumulators._losses.mean()).isfinite().all()


class Token(nn.Module):
    """A parameter read at its use, and one that only the fallback records."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.net = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6)), _normed()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale + opaque(self.shift))


@pytest.mark.parametrize("policy", ["warn", "fallback"])
def test_bare_parameters_and_the_fallback_too(policy: str) -> None:
    module, recorder, keep = recorded(lambda: Penalised(PENALTIES["squares"], Token), uncaptured=policy)
    left = {"shift"} if policy == "warn" else set()
    assert {name.removeprefix("net.") for name in recorder.coverage.uncaptured} == left
    check(module, keep, {name for name, _ in module.net.named_parameters()} - left)


class Unused(nn.Module):
    """A layer that is never called has a gradient by the penalty alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = _normed(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_layer_with_nothing_but_a_penalty_is_not_missing() -> None:
    _, recorder, keep = recorded(lambda: Penalised(PENALTIES["squares"], Unused))
    assert recorder.coverage.share == 1.0 and not recorder.coverage.uncaptured and len(keep.steps) == 4


def _of_rows(net: nn.Module, x: Tensor) -> Tensor:
    """Looks like a penalty, and is of the rows: the weight is used functionally, in no way that is recognised."""
    return torch.cdist(x, net[0].weight).square().mean()


class OfRows(Penalised):
    def training_step(self, batch: Any, index: int) -> Any:
        return self.differentiate(*batch) + _of_rows(self.net, batch[0])


def test_what_rows_change_is_no_term_of_no_row() -> None:
    module, recorder, keep = recorded(lambda: OfRows(PENALTIES["squares"]))
    assert {name.removeprefix("net.") for name in recorder.coverage.uncaptured} >= {"0.weight"}
    assert not recorder.capture.bare.of_no_row
    check(module, keep, {n for n, _ in module.net.named_parameters()} - {"0.weight", "0.bias"})


def test_the_closing_pass_and_influence_functions_leave_it_out() -> None:
    callback = InfluenceCallback("val", [IF(damping=0.1)], on_error="raise")
    fit(Penalised(PENALTIES["squares"]), [callback])
    report = callback.report
    assert report is not None
    found = report.attribution("IF-EKFAC")
    assert found is not None and found.checks[-1].value == 1.0  # captured share
    assert found.scores.shape == (ROWS, 1)


def test_labels_are_drawn_beside_a_penalty() -> None:
    """The Fisher is that of the data: a penalty's gradient is silent in passes with other labels."""
    from ine_callback.capture.label_gradients import sample
    from ine_callback.capture.marks import mark_call

    def mark(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        mark_call(module, args, output)

    net, (x, y) = _normed().double(), data()
    handle = net[0].register_forward_hook(mark)
    found = []
    for penalty in (0.0, 0.1):
        loss = F.cross_entropy(net(x), y) + penalty * PENALTIES["squares"](net)
        sample(loss, torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    handle.remove()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
