"""Copies of rows in a real training are found as near duplicates, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import GradientStore, InfluenceCallback

COPIES, TRAIN = 20, 1000


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.long
def test_copies_of_rows_are_near_duplicates(tmp_path: Path) -> None:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    x[900 : 900 + COPIES], y[900 : 900 + COPIES] = x[100 : 100 + COPIES], y[100 : 100 + COPIES]
    L.seed_everything(1, verbose=False)
    influence = InfluenceCallback("val", store=GradientStore(), dirpath=tmp_path, on_error="raise")
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=10, callbacks=[influence], enable_model_summary=False, **quiet)
    train, val = TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:])
    trainer.fit(Net(), DataLoader(train, 50, shuffle=True), DataLoader(val, 256))
    assert influence.report is not None and influence.report.alike is not None
    found = [group.tolist() for group in influence.report.alike.duplicates]
    copies = [[k, 800 + k] for k in range(100, 100 + COPIES)]
    print(f"\n{sum(pair in found for pair in copies)} of {COPIES} copies at {influence.report.alike.cosine}; {found}")
    assert sum(pair in found for pair in copies) >= 0.9 * COPIES and len(found) <= COPIES + 1
