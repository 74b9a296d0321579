"""A small fit by Lightning with a gradient store, that can be killed and resumed."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.resume import Classifier
from ine_callback import GradientStore, InfluenceCallback

ROWS, BATCH = 40, 8


class Killed(Exception):
    """What ends a training."""


class Killer(L.Callback):
    """Ends a training inside of an epoch."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 13:
            raise Killed


def fit(folder: Path, *callbacks: L.Callback, resume: bool = False) -> tuple[Classifier, InfluenceCallback]:
    """Trains, or goes on from the folder's last checkpoint."""
    L.seed_everything(3, verbose=False)
    rows, held_out = (TensorDataset(torch.randn(n, 5), torch.randint(3, (n,))) for n in (ROWS, 16))
    influence = InfluenceCallback(
        ["val", "self"], refresh_every=3, store=GradientStore(), dirpath=folder / "report", on_error="raise"
    )
    keep = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)
    quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
    quiet["enable_progress_bar"] = any(isinstance(each, ProgressBar) for each in callbacks)
    trainer = L.Trainer(max_epochs=4, num_sanity_val_steps=0, callbacks=[influence, keep, *callbacks], **quiet)
    module = Classifier()
    loader = DataLoader(rows, BATCH, sampler=DistributedSampler(rows, 1, 0, seed=5))
    last = folder / "last.ckpt" if resume else None
    try:
        trainer.fit(module, loader, DataLoader(held_out, 16), ckpt_path=last)
    except Killed:
        assert callbacks
    return module, influence
