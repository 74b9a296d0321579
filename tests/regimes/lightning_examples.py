"""Lightning's own examples, its callbacks that reach into the training, and metrics as a popular template logs them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    RichProgressBar,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from .models import pictures
from .regime import CLASSES, FEATURES, Classifier, Regime, adam


class AutoEncoder(Classifier):
    """examples/pytorch/basics/autoencoder.py: what comes out should be what went in."""

    def __init__(self) -> None:
        coder = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 2))
        super().__init__(nn.Sequential(coder, nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, FEATURES))), adam)

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1)
        return nn.functional.mse_loss(self.net(x), x)


class Pictures(Classifier):
    """examples/pytorch/domain_templates/computer_vision: convolutions, dropout, log-softmax and NLL."""

    def __init__(self) -> None:
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)
        rest = nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES), nn.LogSoftmax(1)
        super().__init__(nn.Sequential(*layers, *rest))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.nll_loss(self.net(batch[0]), batch[1])


class Backbone(Classifier):
    """Transfer learning: a backbone that thaws in the second epoch, under a head."""

    @property
    def backbone(self) -> nn.Module:
        return self.net[:3]

    def parameters_to_train(self) -> Any:
        return list(self.net[3:].parameters())


class Template(Classifier):
    """lightning-hydra-template: metrics that are modules, fed with the loss itself and logged as objects."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)))
        self.train_loss, self.val_loss, self.val_best = MeanMetric(), MeanMetric(), MaxMetric()
        self.train_accuracy, self.val_accuracy = MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_accuracy.reset()
        self.val_best.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.train_loss(loss)
        self.train_accuracy(logits.argmax(1), batch[1])
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.val_loss(loss)
        self.val_accuracy(logits.argmax(1), batch[1])
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc", self.val_accuracy, on_step=False, on_epoch=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.val_best(self.val_accuracy.compute())
        self.log("val/acc_best", self.val_best.compute(), sync_dist=True)


def _with(make: Any, **options: Any) -> Any:
    return lambda: {"callbacks": [make()], **options}


GROUP = "Lightning's examples and callbacks"
EXAMPLES = [
    Regime("autoencoder", GROUP, AutoEncoder),
    Regime("image classifier: dropout, log-softmax, NLL", GROUP, Pictures, pictures, shares="among"),
    Regime(
        "BackboneFinetuning",
        GROUP,
        Backbone,
        trainer=_with(lambda: BackboneFinetuning(1, lambda epoch: 1.5, 0.1, verbose=False)),
    ),
    Regime(
        "GradientAccumulationScheduler",
        GROUP,
        trainer=_with(lambda: GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})),
    ),
    Regime("StochasticWeightAveraging", GROUP, trainer=_with(lambda: StochasticWeightAveraging(0.05, 1, 1))),
    Regime("RichProgressBar", GROUP, trainer=_with(RichProgressBar, enable_progress_bar=True)),
    Regime(
        "torchmetrics of a template, BatchNorm",
        GROUP,
        Template,
        shares="among",
        approximate=("net.1",),
    ),
]
if hasattr(callbacks, "EMAWeightAveraging"):  # since Lightning 2.6
    EXAMPLES.append(Regime("EMAWeightAveraging", GROUP, trainer=_with(lambda: callbacks.EMAWeightAveraging(decay=0.9))))
