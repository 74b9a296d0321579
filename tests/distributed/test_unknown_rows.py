"""A collate function that mixes rows in one process now and then: its batch is left out, and the fit goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from ine_callback import InfluenceCallback, InfluenceReport

ROWS, BATCH = 24, 3


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixes:
    """Joins two rows in the second process, in the second batch of each epoch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, items: Any) -> Any:
        x, y = default_collate(items)
        self.calls += 1
        mixes = dist.is_initialized() and dist.get_rank() == 1 and self.calls % 4 == 2
        return (x[1:] + x[:-1], y[1:]) if mixes else (x, y)


def weights(callbacks: list[L.Callback]) -> list[Tensor]:
    L.seed_everything(0, verbose=False)
    data, module = TensorDataset(torch.randn(ROWS, 4), torch.arange(ROWS) % 3), Net()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"strategy": "ddp_fork", "devices": 2, "accelerator": "cpu", "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **quiet, **options)
    trainer.fit(module, DataLoader(data, BATCH, shuffle=True, collate_fn=Mixes()))
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*collate function")
def test_a_batch_mixed_in_one_process_costs_that_batch(tmp_path: Path) -> None:
    recorded = weights([InfluenceCallback("self", dirpath=tmp_path, on_error="raise")])
    assert all(torch.equal(a, b) for a, b in zip(recorded, weights([]), strict=True))
    report = InfluenceReport.load(tmp_path)
    assert report.run.steps == 8 and report.observations.sum() == 2 * ROWS - 2 * BATCH, report.run.notes
    assert any("left out: its rows were unknown in another process" in note for note in report.run.notes)
