"""Finds wrong labels in handwritten digits while a small CNN learns them.

10 % of the training labels are replaced by a wrong class. The CNN is trained once with InfluenceCallback, and the report
says which rows to look at; only then is the truth used, to check the answer. A second training without the callback
shows that recording changed nothing: all weights are the same, bit by bit.

    python examples/digits.py --out demo
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import rich
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Query


class DigitsCNN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.2), nn.Linear(512, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def noisy_digits(seed: int, share: float = 0.1) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Training set with wrong labels, clean validation set, and the true labels of the training set."""
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    true = torch.tensor(labels)[order]
    train, val = slice(0, 1437), slice(1437, None)
    given = true[train].clone()
    wrong = torch.randperm(len(given), generator=generator)[: int(share * len(given))]
    given[wrong] = (given[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return TensorDataset(images[train], given), TensorDataset(images[val], true[val]), true[train]


def fit(train: TensorDataset, val: TensorDataset, callbacks: list, epochs: int, seed: int) -> tuple[L.Trainer, float]:
    """One training run; returns its trainer and its seconds."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        **{"max_epochs": epochs, "callbacks": callbacks, "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    model, began = DigitsCNN(), time.perf_counter()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=256))
    return trainer, time.perf_counter() - began


def state(trainer: L.Trainer) -> list:
    """Everything that training leaves behind: weights and buffers, optimizer state, logged metrics, random state."""
    everything = trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict(), trainer.callback_metrics
    return [*tree_leaves(everything), torch.get_rng_state()]


def identical(one: list, other: list) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def drawing(images: Tensor) -> str:
    """Images [k, 1, 8, 8] side by side, two characters a pixel."""
    shades = " ░▒▓█"
    lines = [["".join(2 * shades[round(4 * p)] for p in line) for line in image[0].tolist()] for image in images]
    return "\n".join("   ".join(parts).rstrip() for parts in zip(*lines, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    train, val, true = noisy_digits(args.seed)
    images, given = train.tensors
    flipped = (given != true).numpy()
    print(f"Training on {len(given):,} digits, {flipped.sum()} of them with a wrong label; nobody tells the model which.")

    influence = InfluenceCallback(queries=["val", Query.margin("val"), "self"], dirpath=args.out)
    trainer, seconds = fit(train, val, [influence], args.epochs, args.seed)
    report, recorded = influence.report, state(trainer)

    suspects = report.drop_list()  # rows to look at, worst first
    rich.print(report.flagged(query=report.recommended_query)[:6])
    print(drawing(images[suspects[:6]]))
    print("   ".join(f"row {row} says {given[row]}".ljust(16) for row in suspects[:6]))
