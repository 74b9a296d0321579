"""Several views of each row, joined in the training step: a row's contribution is that of all its views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import FINE, IF, InfluenceCallback
from tests.helpers.kept_steps import BATCH, EXACT, Net, check, data, fit, recorded


def network() -> nn.Module:
    """Convolutions, whose parameters are not read at their uses."""
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv1d(4, 3, 3), nn.Flatten()
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *layers, nn.LayerNorm(12), nn.Linear(12, 3))


class Averaged(Net):
    """The mean loss of two views."""

    def __init__(self) -> None:
        super().__init__(network())

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(torch.cat([x, x + 0.1])), y.repeat(2))


class Contrastive(Averaged):
    """SimCLR's loss over both views: each entry's partner is the row's other view."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(net(torch.cat([x, x + 0.1])), dim=1)
        alike = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(alike, torch.arange(len(z)).roll(len(x)))


class Augmented(Contrastive):
    """The second view is drawn anew in every step."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(net(torch.cat([x, x + 0.1 * torch.randn_like(x)])), dim=1)
        alike = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(alike, torch.arange(len(z)).roll(len(x)))


def row_gradients(module: Net, step: int) -> list[tuple[Tensor, ...]]:
    """Of the batch's loss, in which only one row's views have weights with a gradient; of each row in turn."""
    x, y, net = module.seen[step]
    found = []
    for row in range(len(x)):
        own = torch.zeros(2 * len(x), dtype=torch.bool)
        own[[row, row + len(x)]] = True

        class One(nn.Module):
            def forward(self, both: Tensor, own: Tensor = own) -> Tensor:
                found = net(both)
                return torch.where(own[:, None], found, found.detach())

        found.append(torch.autograd.grad(module.loss(One(), x, y), list(net.parameters())))
    return found


def contributions(module: Net, step: int) -> Tensor:
    """<v, each row's contribution>."""
    *_, net = module.seen[step]
    net.eval()
    v = torch.autograd.grad(module.query(net, *data()), list(net.parameters()))
    each = row_gradients(module, step)
    return torch.stack([sum((a * b).sum() for a, b in zip(v, g, strict=True)) for g in each]).detach()


def test_a_loss_by_rows_is_that_of_single_passes() -> None:
    module, recorder, keep = recorded(Averaged, uncaptured="raise")
    check(module, keep)
    assert recorder.capture.views == 2 and recorder.coverage.share == 1.0
    assert any("2 views of each row" in note for note in recorder.coverage.notes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_row_of_a_contrastive_loss_counts_with_both_views(accumulate: int) -> None:
    module, recorder, keep = recorded(Contrastive, {"accumulate_grad_batches": accumulate}, uncaptured="raise")
    assert recorder.coverage.share == 1.0
    for step, (rows, signals, _) in enumerate(keep.steps):
        each = [contributions(module, k) / accumulate for k in range(step * accumulate, (step + 1) * accumulate)]
        assert len(rows) == BATCH * accumulate
        torch.testing.assert_close(signals[:, 0], torch.cat(each), **EXACT)


def test_views_that_are_drawn_anew_are_recognised() -> None:
    _, recorder, keep = recorded(Augmented, uncaptured="raise")
    assert recorder.capture.views == 2 and recorder.coverage.share == 1.0 and len(keep.steps) == 4


class Inside(Net):
    """The network itself joins two views, and gives one answer for each row."""

    def __init__(self) -> None:
        super().__init__(Joining())


class Joining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, x.flip(1)])).unflatten(0, (2, -1)).mean(0)


def test_views_that_the_network_itself_makes_are_the_row_s_own() -> None:
    module, recorder, keep = recorded(Inside, uncaptured="raise")
    check(module, keep)
    assert recorder.capture.views == 2


def test_self_influence_is_that_of_all_views_together() -> None:
    module, _, keep = recorded(Contrastive, queries="self", uncaptured="raise")
    squares = [sum(one.square().sum() for one in g) for g in row_gradients(module, 0)]
    found = keep.steps[0][1][:, 0]
    # a row's own gradient is b times its contribution
    torch.testing.assert_close(found, torch.stack(squares) * BATCH, rtol=1e-8, atol=1e-10)


def test_the_closing_pass_and_influence_functions_take_views_too() -> None:
    callback = InfluenceCallback("val", [FINE(), IF(damping=0.1)], on_error="raise")
    fit(Averaged(), [callback])
    report = callback.report
    assert report is not None and not any("closing pass" in note for note in report.run.notes)
    found = report.attribution("IF-EKFAC")
    assert found is not None and found.checks[-1].value == 1.0  # captured share
    assert np.isfinite(found.scores).all() and np.isfinite(report.scores.mu).all()


@pytest.mark.long
def test_a_smaller_last_batch_has_as_many_views() -> None:
    _, recorder, keep = recorded(Contrastive, {"limit_train_batches": 4, "max_epochs": 2})
    assert len(keep.steps) == 8 and not recorder.failed


def test_losses_of_rows_are_the_means_of_their_views() -> None:
    module, recorder, _ = recorded(Averaged)
    x, y, net = module.seen[0]
    with torch.no_grad():
        each = F.cross_entropy(net(torch.cat([x, x + 0.1])), y.repeat(2), reduction="none").view(2, -1).mean(0)
    assert np.allclose(recorder.accumulators._losses.mean()[: len(x)], each, rtol=1e-6)


def test_layers_of_other_numbers_of_rows_are_left_out_as_before() -> None:
    class Mixed(Averaged):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv1d(1, 2, 3).double()

        def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return super().loss(net, x, y) + self.other(x[:, None]).square().mean()

    _, recorder, _ = recorded(Mixed)
    assert recorder.capture.views == 1
    assert any("2 views of the rows" in why for why in recorder.coverage.uncaptured.values())
