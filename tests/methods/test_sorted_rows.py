"""Passes after the fit read rows by their index. A collate function may sort or drop them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from ine_callback import BIF, FINE, IF, InfluenceCallback, InfluenceReport
from ine_callback.errors import QueryError
from ine_callback.queries.sources import DataSource, in_order

_DICE = torch.Generator().manual_seed(0)
DATA: list[Any] = [
    (torch.randn(int(n), 4, generator=_DICE), int(n) % 3) for n in torch.randint(2, 9, (24,), generator=_DICE)
]


def padded(items: list[Any]) -> Any:
    lengths = torch.tensor([len(x) for x, _ in items])
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items]), lengths


def longest_first(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: len(item[0]), reverse=True))


def backwards(items: list[Any]) -> Any:
    return padded(items[::-1])


def without_broken(items: list[Any]) -> Any:
    return padded([item for item in items if item is not None])


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, lengths = batch
        there = torch.arange(x.shape[1]) < lengths[:, None]
        words = self.inner(x).tanh() * there[..., None]
        return F.cross_entropy(self.head(words.sum(1) / lengths[:, None]), y)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def report_of(data: list[Any], collate: Callable[[Any], Any], methods: list[Any]) -> InfluenceReport:
    L.seed_everything(0, verbose=False)
    influence = InfluenceCallback("val", methods, reservoir=0, on_error="raise")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[influence],
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(Net(), DataLoader(data, 8, collate_fn=collate), DataLoader(DATA[:8], 8, collate_fn=padded))
    assert influence.report is not None
    return influence.report


@pytest.mark.long
@pytest.mark.parametrize("collate", [longest_first, backwards], ids=lambda f: f.__name__)
def test_sorted_rows_have_their_own_scores(collate: Callable[[Any], Any]) -> None:
    plain, found = (
        report_of(DATA, how, [FINE(null_draws=2), IF(), BIF(draws=20, chains=2)]) for how in (padded, collate)
    )
    # labels are drawn for the closing pass's curvature, in the rows' order: mu is the same but for that
    assert np.corrcoef(found.scores.mu[:, 0], plain.scores.mu[:, 0])[0, 1] > 0.98
    for one, other in zip(plain.attributions, found.attributions, strict=True):
        np.testing.assert_allclose(other.scores, one.scores, rtol=1e-3, atol=1e-4 * np.abs(one.scores).max())


def test_dropped_rows_cost_no_closing_pass() -> None:
    data = [None if k == 5 else item for k, item in enumerate(DATA)]
    report = report_of(data, without_broken, [FINE(null_draws=2)])
    assert not any("closing pass" in note for note in report.run.notes)
    assert np.isfinite(report.scores.mu[:, 0]).tolist() == [k != 5 for k in range(24)]


def test_a_batch_is_put_in_order_or_refused() -> None:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return torch.zeros(())

    source = DataSource("Me", loss, DataLoader(DATA, 4, collate_fn=longest_first))
    rows, batch = source.followed([3, 4, 5])
    assert sorted(rows) == [3, 4, 5] and batch[2].tolist() == [len(DATA[row][0]) for row in rows]
    assert in_order([3, 4, 5], rows, batch, "Me")[2].tolist() == [len(DATA[row][0]) for row in (3, 4, 5)]
    with pytest.raises(QueryError, match=r"Me: the collate function drops rows \(\[6\]\)"):
        in_order([3, 4, 5, 6], rows, batch, "Me")
