"""The closing pass in a real Trainer: rows by index or as their last batches, several processes, interruptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ine_callback import FINE, FitContext, InfluenceCallback, InfluenceReport
from tests.helpers.accidents import accident

ROWS = 48
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "max_epochs": 3,
}
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(L.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=g)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long(), torch.arange(ROWS))


def fit(callbacks: list[L.Callback], loader: Any = None, module: Net | None = None, **options: Any) -> Net:
    module = module or Net()
    torch.manual_seed(7)
    trainer = L.Trainer(callbacks=callbacks, **QUIET | options)
    trainer.fit(module, loader or DataLoader(data(), 8, shuffle=True), DataLoader(data(), 16))
    return module


def test_training_is_bit_identical_with_dropout() -> None:
    one, other = fit([InfluenceCallback("val", on_error="raise")], module=Net(0.3)), fit([], module=Net(0.3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(ROWS)
        return iter([tuple(part[k] for part in data().tensors) for k in order])


def test_rows_of_a_stream_are_their_last_batches() -> None:
    """Read by index or kept from training, the rows are the same, and so are their shifts at the same weights."""
    found = []
    for kept in (False, True):
        method = FINE()
        callback = InfluenceCallback("val", [method], row_fn=lambda batch: batch[2], num_rows=ROWS, on_error="raise")
        module = Net()
        torch.manual_seed(7)
        steps = {"max_steps": 3 * ROWS // 8}  # a stream's length is unknown, and so the planned steps
        trainer = L.Trainer(callbacks=[callback], **QUIET | steps)
        train = DataLoader(Stream(), 8) if kept else DataLoader(data(), 8, sampler=Shuffled())
        trainer.fit(module, train, DataLoader(data(), 16))
        assert method._closing is not None and np.isfinite(method._closing.shift).all()
        found.append(method._closing.shift[:, 0])
    assert np.corrcoef(*found)[0, 1] > 0.8  # labels are drawn in another order


class Shuffled(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(ROWS).tolist())

    def __len__(self) -> int:
        return ROWS


def test_several_processes_score_like_one(tmp_path: Path) -> None:
    reports = []
    for devices in (1, 2):
        options = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        folder = tmp_path / str(devices)
        loader = DataLoader(data(), ROWS // devices)  # all rows a step, so their order does not matter
        fit([InfluenceCallback("val", dirpath=folder, on_error="raise")], loader, **options)
        reports.append(InfluenceReport.load(folder))
    one, two = (report.scores.mu for report in reports)
    np.testing.assert_allclose(two, one, atol=0.1 * np.abs(one).max())  # the run samples other rows for its discount


@pytest.mark.parametrize("place", [(FitContext, "__post_init__"), (FitContext, "query_values")])
def test_an_accident_in_the_pass_costs_nothing_but_the_pass(place: tuple[type, str]) -> None:
    callback = InfluenceCallback("val")
    with accident(*place, 0):
        one = fit([callback])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), fit([]).parameters(), strict=True))
    assert callback.report is not None and np.isfinite(callback.report.scores.mu).all()
    (note,) = [note for note in callback.report.run.notes if "closing pass" in note]
    assert note.startswith("no closing pass: Accident: the roof fell in; scores are of the run alone")


def test_an_interrupted_training_is_not_held_up() -> None:
    class Interrupts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 9:
                raise KeyboardInterrupt

    method = FINE()
    callback = InfluenceCallback("val", [method], on_error="raise")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit([callback, Interrupts()])
    assert method._closing is None and callback.report is not None
    assert np.isfinite(callback.report.scores.mu).all()
