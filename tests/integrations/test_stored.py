"""The gradient store under Lightning: saved with the report, in checkpoints, asked by the module's own loss."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ine_callback import GradientStore, InfluenceCallback, InfluenceReport

ROWS, BATCH = 40, 8


class Killed(Exception):
    """What ends a training."""


class Killer(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 13:
            raise Killed


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def fit(folder: Path, *callbacks: L.Callback, resume: bool = False) -> tuple[Classifier, InfluenceCallback]:
    L.seed_everything(3, verbose=False)
    rows, held_out = (TensorDataset(torch.randn(n, 5), torch.randint(3, (n,))) for n in (ROWS, 16))
    influence = InfluenceCallback(
        ["val", "self"], refresh_every=3, store=GradientStore(), dirpath=folder / "report", on_error="raise"
    )
    keep = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=4, num_sanity_val_steps=0, callbacks=[influence, keep, *callbacks], **quiet)
    module = Classifier()
    loader = DataLoader(rows, BATCH, sampler=DistributedSampler(rows, 1, 0, seed=5))
    last = folder / "last.ckpt" if resume else None
    try:
        trainer.fit(module, loader, DataLoader(held_out, 16), ckpt_path=last)
    except Killed:
        assert callbacks
    return module, influence


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, InfluenceCallback, Path]:
    """A training that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    return *fit(folder), folder


def test_a_killed_and_resumed_training_ends_with_the_same_store(
    whole: tuple[Classifier, InfluenceCallback, Path], tmp_path: Path
) -> None:
    fit(tmp_path, Killer())
    _, resumed = fit(tmp_path, resume=True)
    one, other = whole[1].report, resumed.report
    assert one is not None and one.store is not None and other is not None and other.store is not None
    np.testing.assert_array_equal(one.scores.mu, other.scores.mu)
    for name, value in vars(one.store).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(other.store, name), err_msg=name)


def test_a_saved_report_is_asked_with_the_module_and_its_own_loss(
    whole: tuple[Classifier, InfluenceCallback, Path],
) -> None:
    module, influence, folder = whole
    report = InfluenceReport.load(folder / "report")
    loader = DataLoader(TensorDataset(torch.randn(8, 5), torch.randint(3, (8,))), 4)
    found = report.ask({"mine": loader}, module)
    assert found.scores.shape == (ROWS, 1) and np.isfinite(found.scores).all()
    again = report.with_attributions(found)  # shown, exported and compared like any method's scores
    assert "asked/mine" in again.to_pandas().columns and again.store is not None
    assert influence.report is not None and influence.report.store is not None
