"""Regimes of the Trainer and the optimizer: precision, accumulation, clipping, schedules, skipped steps."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler

from .regime import FEATURES, Classifier, Regime, adam

HALF = 0.05  # bfloat16 keeps 8 bits, so single products are off by up to 0.4 %


def scaled(scale: float) -> dict[str, Any]:
    """float16 with a gradient scaler; from 2^24 on the first steps overflow and are skipped."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


class Skips(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class Groups(Classifier):
    """No weight decay for biases, a rate of its own for the last layer."""

    def parameters_to_train(self) -> Any:
        weights, biases = ([p for p in self.net[:3].parameters() if (p.dim() == 1) == bias] for bias in (False, True))
        last = list(self.net[3:].parameters())
        decayed = {"params": weights, "weight_decay": 0.1}
        return [decayed, {"params": biases, "weight_decay": 0.0}, {"params": last, "lr": 0.03}]


class ByHand(Classifier):
    """Manual optimization, also of the scheduler."""

    def __init__(self) -> None:
        super().__init__(schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.7))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


def with_adamw() -> Classifier:
    return Classifier(optimizer=adam)


def per_step(optimizer: torch.optim.Optimizer) -> Any:
    return {"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12), "interval": "step"}


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0), "monitor": "val"}


def _clip(algorithm: str, value: float) -> Any:
    return lambda: {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}


PRECISION = [
    Regime("32", "precision"),
    Regime("64-true", "precision", trainer=lambda: {"precision": "64-true"}, dtype=torch.float64, tolerance=1e-6),
    Regime("bf16-mixed", "precision", trainer=lambda: {"precision": "bf16-mixed"}, tolerance=HALF),
    Regime("bf16-true", "precision", trainer=lambda: {"precision": "bf16-true"}, tolerance=HALF),
    Regime("16-mixed", "precision", trainer=lambda: scaled(2.0**16), tolerance=0.01),
    Regime("16-mixed, steps skipped for inf", "precision", trainer=lambda: scaled(2.0**24), tolerance=0.01),
    Regime(
        "16-mixed, AdamW, steps skipped for inf",
        "precision",
        with_adamw,
        trainer=lambda: scaled(2.0**24),
        tolerance=0.01,
    ),
    Regime("16-mixed, AdamW", "precision", with_adamw, trainer=lambda: scaled(2.0**10), tolerance=0.01),
    Regime(
        "16-mixed, accumulated and clipped",
        "precision",
        trainer=lambda: scaled(2.0**16) | {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        tolerance=0.01,
    ),
]
STEPS = [
    Regime("AdamW", "optimizer", with_adamw),
    Regime("SGD without momentum", "optimizer", lambda: Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))),
    Regime("parameter groups: weight decay, own rate", "optimizer", Groups),
    Regime("schedule per step", "optimizer", lambda: Classifier(schedule=per_step)),
    Regime(
        "schedule per epoch",
        "optimizer",
        lambda: Classifier(schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.3)),
    ),
    Regime("schedule on a plateau", "optimizer", lambda: Classifier(schedule=plateau)),
    Regime("accumulation, 4 batches by 2", "steps", trainer=lambda: {"accumulate_grad_batches": 2}),
    Regime("accumulation, short last window", "steps", trainer=lambda: {"accumulate_grad_batches": 3}),
    Regime("clipping by norm", "steps", trainer=_clip("norm", 0.3)),
    Regime("clipping by value", "steps", trainer=_clip("value", 0.05), tolerance=1e-4),
    Regime("training_step returns None", "steps", Skips),
    Regime("training_step returns None, accumulated", "steps", Skips, trainer=lambda: {"accumulate_grad_batches": 2}),
    Regime(
        "dropout",
        "steps",
        lambda: Classifier(nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))),
        shares="among",
    ),
    Regime("manual optimization", "steps", ByHand),
    Regime("validation inside of an epoch", "steps", trainer=lambda: {"val_check_interval": 0.5}),
    Regime("limit_train_batches", "steps", trainer=lambda: {"limit_train_batches": 2}),
    Regime("max_steps inside of an epoch", "steps", trainer=lambda: {"max_epochs": -1, "max_steps": 6}),
    Regime(
        "early stopping",
        "steps",
        trainer=lambda: {"max_epochs": 9, "callbacks": [EarlyStopping("val", patience=1, min_delta=9.0)]},
        note="training stopped after 8 of 36 planned steps",
    ),
]
OPTIONS = [*PRECISION, *STEPS]
