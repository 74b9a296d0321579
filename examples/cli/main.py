"""A LightningCLI app on scikit-learn's digits. Nothing in here knows about influence: config.yaml turns it on and off.

Train with the report, without it, and with another setting:

    python examples/cli/main.py fit --config examples/cli/config.yaml
    python examples/cli/main.py fit --config examples/cli/config.yaml --trainer.callbacks.enabled=false
    python examples/cli/main.py fit --config examples/cli/config.yaml --trainer.callbacks.refresh_every=5
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsData(L.LightningDataModule):
    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        parts = torch.Generator().manual_seed(0)
        self.train, self.val = random_split(TensorDataset(images, torch.tensor(labels)), [1437, 360], parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 256)


class SmallCNN(L.LightningModule):
    def __init__(self, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16 * width, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, prog_bar=True)
        return loss


def main() -> LightningCLI:
    return LightningCLI(SmallCNN, DigitsData)


if __name__ == "__main__":
    main()
