"""The sampler for the next training: how often rows come, alone, in Lightning and dealt out to processes."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceSampler
from ine_callback.errors import InfluenceError

WEIGHTS = torch.tensor([0.0, 1.0, 0.5, 1.5, 0.25, 1.0, 2.0, 0.75])


def test_rows_come_as_often_as_their_weights_say() -> None:
    before = torch.get_rng_state()
    sampler = InfluenceSampler(WEIGHTS, seed=3)
    counts = np.stack([np.bincount(list(sampler), minlength=8) for _ in range(800)])
    assert (counts.sum(1) == len(sampler)).all() and len(sampler) == 7
    assert ((counts == WEIGHTS.floor().long().numpy()) | (counts == WEIGHTS.ceil().long().numpy())).all()
    np.testing.assert_allclose(counts.mean(0), WEIGHTS, atol=0.06)  # three standard errors of the least certain row
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_differ_and_can_be_repeated() -> None:
    sampler, again = InfluenceSampler(np.ones(50), seed=1), InfluenceSampler(np.ones(50), seed=1)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second != sorted(second)
    again.set_epoch(1)
    assert list(again) == second and list(InfluenceSampler(np.ones(50), seed=2)) != first


def test_weights_need_no_whole_sum() -> None:
    sampler = InfluenceSampler([0.3] * 9)  # 2.7
    assert len(sampler) == 3 and all(len(list(sampler)) == 3 for _ in range(50))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, float("nan")], [0.1, 0.1], [[1.0]]])
def test_weights_that_make_no_sense_are_refused(weights: list) -> None:
    with pytest.raises(InfluenceError, match="InfluenceSampler: weights of shape"):
        InfluenceSampler(weights)


class Journal(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch[0][:, 0].long().tolist()))
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(epochs: int, path: str | None = None) -> tuple[Journal, L.Trainer]:
    module, rows = Journal(), TensorDataset(torch.arange(8.0)[:, None])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(rows, batch_size=3, sampler=InfluenceSampler(WEIGHTS, seed=5)), ckpt_path=path)
    return module, trainer


def test_lightning_says_the_epoch_also_after_resuming(tmp_path: Path) -> None:
    expected = InfluenceSampler(WEIGHTS, seed=5)
    whole, _ = fit(3)
    for epoch in range(3):
        assert [row for at, rows in whole.seen if at == epoch for row in rows] == list(expected)
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = fit(3, str(tmp_path / "last.ckpt"))
    assert resumed.seen == [batch for batch in whole.seen if batch[0] == 2]


def test_lightning_deals_the_rows_out_to_processes() -> None:
    expected = InfluenceSampler(WEIGHTS, seed=5)
    ranks = [
        DistributedSamplerWrapper(InfluenceSampler(WEIGHTS, seed=5), num_replicas=2, rank=rank, shuffle=False)
        for rank in range(2)
    ]
    for epoch in range(2):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        permuted = [row for pair in zip(*ranks, strict=True) for row in pair]
        drawn = list(expected)
        assert permuted == drawn + drawn[:1]  # seven rows for two processes: one is repeated
