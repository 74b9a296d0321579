"""Trainings of a LightningModule on subsets: those of a plain Trainer, repeatable, without a trace."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ine_callback import AirRep, FeatureEncoder, retraining
from ine_callback.errors import InfluenceError

QUIET: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def sets() -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:])


def trainer() -> L.Trainer:
    return L.Trainer(max_epochs=3, enable_model_summary=False, **QUIET)


def test_it_is_a_fit_of_the_trainer() -> None:
    rows, dev = sets()
    chosen = np.arange(0, 40, 3)
    found = retraining(Net, trainer, rows, dev, batch_size=4)(chosen, 5)
    torch.manual_seed(5)
    net = Net()
    order = torch.Generator().manual_seed(5)
    trainer().fit(net, DataLoader(Subset(rows, chosen.tolist()), 4, shuffle=True, generator=order))
    net.eval()
    assert torch.equal(found, F.cross_entropy(net(dev.tensors[0]), dev.tensors[1], reduction="none").detach())


def test_it_repeats_and_leaves_no_trace() -> None:
    rows, dev = sets()
    train = retraining(Net, trainer, rows, dev)
    one = train(np.arange(20), 0)
    torch.rand(3), random.random(), np.random.rand()  # so that the states are not what a seeded training leaves
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)  # type: ignore[union-attr]
    assert torch.equal(train(np.arange(20), 0), one)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)  # type: ignore[union-attr]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not torch.equal(train(np.arange(20), 1), one) and not torch.equal(train(np.arange(1, 21), 0), one)


def test_from_a_module_to_a_report(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    rows, dev = sets()
    model = Net()
    trainer().fit(model, DataLoader(rows, 8))
    encoder = FeatureEncoder(model, rows[:8], classes=2)
    airrep = AirRep(encoder, subsets=30, size=8, dev=dev, steps=20)
    airrep.collect(retraining(Net, trainer, rows, dev), rows, tmp_path, progress=False).fit(progress=False)
    found = airrep.scores(dev).attribution("AirRep")
    assert found is not None and found.scores.shape == (40, 20) and np.isfinite(found.scores).all()


def test_a_loss_of_the_batch_is_refused() -> None:
    rows, dev = sets()
    mean = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    with pytest.raises(InfluenceError, match=r"row_loss gives \(\) for a batch; it must be one loss for each row"):
        retraining(Net, trainer, rows, dev, row_loss=mean)(np.arange(8), 0)
