"""Under a real Trainer: metrics, logs and weights are those of the plain training, also where the isolation fails."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import Accuracy, MulticlassAccuracy, MulticlassF1Score

from ine_callback import InfluenceCallback
from tests.helpers.meter import Meter


class Template(L.LightningModule):
    """The module of a popular template: metrics of losses, logged as objects."""

    def __init__(self, first: str = "accuracy") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        if first == "accuracy":
            self.train_acc, self.val_acc = (Accuracy(task="multiclass", num_classes=3) for _ in range(2))
        self.train_loss, self.val_loss, self.val_best = MeanMetric(), MeanMetric(), MaxMetric()
        if first == "loss":
            self.train_acc, self.val_acc = (Accuracy(task="multiclass", num_classes=3) for _ in range(2))
        self.many = MetricCollection({"f": MulticlassF1Score(3), "a": MulticlassAccuracy(3)}, prefix="many/")
        self.more = nn.ModuleDict({"sum": SumMetric()})
        self.total = Meter()
        self.hidden: Any = None

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_best.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.train_loss(loss)
        self.train_acc(logits, batch[1])
        self.many.update(logits, batch[1])
        self.more["sum"].update(loss)
        self.total.update(float(loss))
        self.hidden = (loss, logits)
        for name, metric in (("loss", self.train_loss), ("acc", self.train_acc), ("sum", self.more["sum"])):
            self.log(f"train/{name}", metric, on_step=False, on_epoch=True)
        self.log_dict(self.many, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.val_loss(loss)
        self.val_acc(logits, batch[1])
        self.total.update(float(loss))
        self.log("val/loss", self.val_loss)
        self.log("val/acc", self.val_acc)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.val_best(self.val_acc.compute())
        self.log("val/best", self.val_best.compute())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


Make = Callable[[str], Template]
Fitted = tuple[Template, dict[str, Tensor]]


def fitted(callbacks: list[Any], sanity: int, make: Make, kind: str) -> Fitted:
    L.seed_everything(0, verbose=False)
    x, y = torch.randn(48, 6), torch.randint(3, (48,))
    module = make(kind)
    trainer = L.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": sanity},
        callbacks=callbacks,
    )
    train = DataLoader(TensorDataset(x[:32], y[:32]), batch_size=8, shuffle=True)
    trainer.fit(module, train, DataLoader(TensorDataset(x[32:], y[32:]), batch_size=8))
    return module, dict(trainer.callback_metrics)


@cache
def fitted_plainly(sanity: int, make: Make, kind: str) -> Fitted:
    """Without the callback, which comes out the same each time."""
    return fitted([], sanity, make, kind)


def assert_same_fit(callback: InfluenceCallback, sanity: int, make: Make, kind: str) -> None:
    plain, expected = fitted_plainly(sanity, make, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, found = fitted([callback], sanity, make, kind)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    states = module.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in plain.state_dict().items())
    assert module.total.values == plain.total.values
    assert len(vars(module)) == len(vars(plain))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("first", ["accuracy", "loss"])
@pytest.mark.parametrize("queries", [["self"], ["self", "val"]], ids=["self", "both"])
def test_the_templates_training_is_the_same(queries: list[str], first: str, sanity: int) -> None:
    callback = InfluenceCallback(queries=queries, on_error="raise")  # type: ignore[arg-type]
    assert_same_fit(callback, sanity, Template, first)
    assert callback.report is not None and bool(np.isfinite(callback.report.scores.mu).all())


class Bomb(random.Random):
    """A generator whose state cannot be read from some time on."""

    fuse = 0

    def getstate(self) -> Any:
        type(self).fuse -= 1
        if self.fuse < 0:
            raise OSError("no state")
        return super().getstate()


def with_bomb(place: str) -> Template:
    module = Template()
    holder: Any = module if place == "module" else module.train_acc if place == "metric" else module.total
    holder.__dict__["bomb"] = Bomb()
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fuse", range(5))
@pytest.mark.parametrize("place", ["module", "metric", "object"])
def test_a_training_goes_on_where_isolation_fails(place: str, fuse: int) -> None:
    callback = InfluenceCallback(queries=["self", "val"])
    plain, expected = fitted_plainly(2, with_bomb, place)
    Bomb.fuse = fuse
    module, found = fitted([callback], 2, with_bomb, place)
    assert Bomb.fuse < 0
    assert expected.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in expected.items())
    states = module.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in plain.state_dict().items())
    assert module.total.sum == plain.total.sum
