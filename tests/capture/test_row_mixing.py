"""Rows that are permuted or mixed inside of the training step, in training mode only: found; other models pass."""

from __future__ import annotations

import random
import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback

ROWS = 24
DICE = torch.Generator().manual_seed(0)
X, Y = torch.randn(ROWS, 6, generator=DICE), torch.randint(3, (ROWS,), generator=DICE)


class Net(L.LightningModule):
    """Its weights never change, so that a row's mean loss in the report must be the row's own loss."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(6, 8), nn.Sequential(*middle), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.first(x)))

    def hidden(self, h: Tensor) -> Tensor:
        return self.middle(torch.tanh(h))

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    def training_step(self, batch: Any) -> Tensor:
        x, y = self.batch(*batch) if self.training else batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Permuted(Net):
    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(x))
        return x[order], y[order]


class TwoSwapped(Net):
    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.arange(len(x))
        order[[1, 2]] = order[[2, 1]]
        return x[order], y[order]


class NowAndThen(Net):
    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (0.6 * x + 0.4 * x.flip(0) if random.random() < 0.5 else x), y


class Sorted(Net):
    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = x[:, 0].argsort()
        return x[order], y[order]


class Labels(Net):
    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y.roll(1)


class Mixup(Net):
    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        order, fraction = torch.randperm(len(x)), float(np.random.beta(1, 1)) if self.training else 1.0
        z = self(fraction * x + (1 - fraction) * x[order])
        return fraction * F.cross_entropy(z, y) + (1 - fraction) * F.cross_entropy(z, y[order])


class Manifold(Net):
    def hidden(self, h: Tensor) -> Tensor:
        return 0.7 * h + 0.3 * h.roll(1, 0) if self.training else h


class Noise(Net):
    """Random numbers for each row, as many as there are numbers in it."""

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x + torch.randn_like(x)) * (torch.rand(len(x), 1) < 0.7), y

    def hidden(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.3, self.training)


class RowByRow(Net):
    """Draws as many random numbers as the row's first number says."""

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([row + torch.randn(1 + int(4 * row[0].abs())).sum() for row in x]), y


class OwnNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True) if self.training else x


class ShuffledInside(Net):
    """As MoCo's shuffled BatchNorm: the rows are back in their order behind it."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(len(x)) if self.training else torch.arange(len(x))
        return self.head(self.hidden(self.first(x[order])[order.argsort()]))


def fit(module: Net) -> InfluenceCallback:
    L.seed_everything(0, verbose=False)
    callback = InfluenceCallback("self")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=6))
    return callback


@pytest.mark.parametrize("kind", [Permuted, TwoSwapped, NowAndThen, Sorted, Labels, Mixup, Manifold])
def test_mixed_rows_are_found_and_named(kind: type[Net]) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="rows are permuted or mixed inside training_step"):
        callback = fit(kind())
    assert callback.report is not None and callback.report.run.captured_share == 0.0
    assert callback.report.run.steps == 0 and not np.isfinite(callback.report.scores.mean_loss).any()


WITHOUT_MIXING: list[Net] = [
    Net(),
    Net(nn.Dropout(0.5), nn.RReLU()),
    Net(nn.BatchNorm1d(8), nn.AlphaDropout(0.2)),
    Net(OwnNorm()),
    Noise(),
    RowByRow(),
]


@pytest.mark.parametrize("module", WITHOUT_MIXING, ids=lambda m: f"{type(m).__name__}{len(m.middle)}")
def test_models_that_draw_random_numbers_but_mix_no_rows_pass(module: Net) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*InfluenceCallback")
        callback = fit(module)
    assert callback.report is not None and callback.report.run.captured_share == 1.0
    own_norm = any(isinstance(each, OwnNorm) for each in module.middle)
    assert ("statistic of the batch" in callback.report.run.approximate.get("head", "")) == own_norm
    if type(module) is Net and not module.middle:
        own = F.cross_entropy(module(X), Y, reduction="none").detach()
        np.testing.assert_allclose(callback.report.scores.mean_loss, own, rtol=1e-5)


def test_a_layer_inside_of_a_shuffle_is_left_out_alone() -> None:
    with pytest.warns(UserWarning, match="first.weight .*rows are permuted"):
        callback = fit(ShuffledInside())
    assert callback.report is not None
    assert set(callback.report.run.uncaptured) == {"first.weight", "first.bias"}
    assert np.isfinite(callback.report.scores.mean_loss).all()


class Journal(Net):
    def training_step(self, batch: Any) -> Tensor:
        if self.training:
            SEEN.append(batch[0])
            COUNT["steps"] += 1
        return super().training_step(batch)


SEEN: list[Tensor] = []
COUNT = {"steps": 0}


def test_the_check_leaves_no_trace_in_what_the_step_gathers_outside_of_the_module() -> None:
    SEEN.clear()
    COUNT["steps"] = 0
    callback = fit(Journal())
    assert callback.report is not None and callback.report.run.captured_share == 1.0
    assert len(SEEN) == COUNT["steps"] == callback.report.run.steps
