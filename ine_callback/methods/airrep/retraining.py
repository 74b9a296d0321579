"""Trainings of a LightningModule on subsets, as :meth:`AirRep.collect` asks for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ine_callback.errors import InfluenceError
from ine_callback.methods.airrep.collect import Train
from ine_callback.methods.airrep.settings import NAME
from ine_callback.utilities.isolation import unmoved
from ine_callback.utilities.quiet import quiet

RowLoss = Callable[[Any, Any], Tensor]


def cross_entropy(module: Any, batch: Any) -> Tensor:
    """Cross entropy [b] of ``module(batch[0])`` with the classes ``batch[1]``."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def retraining(
    module: Callable[[], L.LightningModule],
    trainer: Callable[[], L.Trainer],
    dataset: Dataset[Any],
    dev: Dataset[Any],
    batch_size: int = 32,
    row_loss: RowLoss = cross_entropy,
) -> Train:
    """A function that trains a fresh module on some rows with a seed, and returns the losses of the dev rows.

    Random states are as before afterwards. The same rows and seed give the same losses, as far as the training is
    deterministic.

    Args:
        module: Makes a fresh module.
        trainer: Makes a Trainer, which should be quiet: no logger, progress bar or checkpoints.
        dataset: The training rows, map-style.
        dev: The dev rows, map-style.
        batch_size: Of both.
        row_loss: ``(module, batch) -> losses [b]``, of a trained module in evaluation mode.

    Example:
        >>> class Line(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.line = nn.Linear(1, 2)
        ...
        ...     def forward(self, x):
        ...         return self.line(x)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> rows = torch.utils.data.TensorDataset(torch.randn(20, 1), torch.arange(20) % 2)
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        >>> trainer = lambda: L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> retraining(Line, trainer, rows, rows)(np.arange(8), 0).shape
        torch.Size([20])
    """

    def train(rows: NDArray[np.int64], seed: int) -> Tensor:
        with unmoved((dataset, dev)), quiet():
            _seed(seed)
            fresh, by = module(), trainer()
            order = torch.Generator().manual_seed(seed)
            by.fit(fresh, DataLoader(Subset(dataset, rows.tolist()), batch_size, shuffle=True, generator=order))
            if by.interrupted:
                raise KeyboardInterrupt
            device = by.strategy.root_device
            fresh.to(device).eval()
            with torch.no_grad():
                parts = [row_loss(fresh, move_data_to_device(batch, device)) for batch in DataLoader(dev, batch_size)]
        if any(part.dim() != 1 for part in parts):
            raise InfluenceError(
                f"{NAME}: row_loss gives {tuple(parts[0].shape)} for a batch; it must be one loss for each row [b], "
                'such as by reduction="none".'
            )
        return torch.cat(parts).cpu()

    return train


def _seed(seed: int) -> None:
    """Seeds all streams; Lightning's own function would leave environment variables behind."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
