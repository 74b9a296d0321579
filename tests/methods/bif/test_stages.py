"""Chains at several moments of a fit, and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from ine_callback import BIF, FINE, CallableQuery, InfluenceCallback, InfluenceReport, bif_scores, run_bif
from ine_callback.errors import InfluenceError
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import QUIET, ROWS, SHORT_CHAINS, Model, data, fit, loaders

STAGES: dict[str, Any] = {**SHORT_CHAINS, "at": [1, 2, "end"]}


class Keep(L.Callback):
    """Weights at the end of each epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.long
def test_stages_are_the_chains_of_their_moment_and_change_nothing() -> None:
    alone, _, _ = fit([FINE()], **QUIET)
    keep = Keep()
    model, report, _ = fit([FINE(), BIF(**STAGES)], callbacks=[keep], **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), model.state_dict().values(), strict=True))
    assert alone.seen == model.seen and [found.at for found in report.stages("BIF")] == [1, 2, "end"]
    assert report.bif is report.stages("BIF")[-1]
    x, y = data()
    for found, weights in zip(report.stages("BIF"), keep.weights, strict=True):
        model.load_state_dict(weights)
        again = bif_scores(
            model, (x[:ROWS], y[:ROWS]), {"val": (x[ROWS:], y[ROWS:])}, BIF(**STAGES), progress=False, at=found.at
        )
        assert np.allclose(again.scores, found.scores, rtol=1e-4, atol=1e-7)
    first, last = report.stages("BIF")[0], report.stages("BIF")[-1]
    assert np.abs(first.scores - last.scores).max() > 1e-3  # another moment, another answer


@pytest.mark.long
def test_stages_are_saved_shown_and_drawn(tmp_path: Path) -> None:
    _, report, _ = fit([FINE(), BIF(**STAGES)], dirpath=tmp_path / "it", **QUIET)
    again = InfluenceReport.load(tmp_path / "it")
    for one, other in zip(report.stages("BIF"), again.stages("BIF"), strict=True):
        assert_same(one, other)
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(report)
    assert "After epoch 1: " in (text := console.export_text()) and "rank agreement with the end of training" in text
    ax = report.plot.stages("val")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["epoch 1", "epoch 2", "end"]
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
    best = report.bif.correlation[:, 0].argmax()
    assert lines[0].get_ydata()[-1] == report.bif.correlation[best, 0]
    page = (tmp_path / "it" / "report.html").read_text()
    assert '"stages":["epoch 1","epoch 2","end"]' in page and "After epoch 2" in page
    _, single, _ = fit([FINE(), BIF(**SHORT_CHAINS)], **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the method ran at 1 stages; .*at=\[2, 5, 'end'\]"):
        single.plot.stages()


def test_a_stage_that_never_came_is_told() -> None:
    _, report, _ = fit([FINE(), BIF(**SHORT_CHAINS, at=[99])], **QUIET)  # type: ignore[arg-type]
    assert not report.attributions and "training ended before epochs [99]" in " ".join(report.run.notes)


@pytest.mark.parametrize("at", ["end", [], [0], [True], ["start"], [2, 2], [1.5]])
def test_stages_that_cannot_be(at: Any) -> None:
    with pytest.raises(InfluenceError, match=r"BIF: at=.* must list different numbers of finished epochs"):
        BIF(at=at)


def counting(stop_at: int, error: type[BaseException]) -> CallableQuery:
    """The validation loss, that raises at its n-th evaluation without a gradient."""
    calls = [0]

    def loss(module: Any, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == stop_at:
                raise error("stop")
        return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])

    return CallableQuery(loss, "val", "loss")


def test_ctrl_c_in_the_middle_ends_the_fit_and_keeps_what_was_drawn() -> None:
    torch.manual_seed(1)
    influence = InfluenceCallback({"val": counting(9, KeyboardInterrupt)}, [FINE(), BIF(**STAGES)], on_error="raise")
    trainer = L.Trainer(max_epochs=3, callbacks=[influence], logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(SystemExit):
        trainer.fit(Model(), *loaders())
    assert influence.report is not None and [found.at for found in influence.report.stages("BIF")] == [1]
    found = influence.report.stages("BIF")[0]
    assert not found.reliable and "interrupted after 8 of 24 draws" in found.notes[0]
    assert influence.report.run.steps == 6 and np.isfinite(found.scores).all()


@pytest.mark.long
def test_a_stage_that_fails_costs_nothing_else() -> None:
    alone, _, _ = fit([FINE()], **QUIET)
    ready = loaders()
    torch.manual_seed(1)
    influence = InfluenceCallback({"val": counting(9, ArithmeticError)}, [FINE(), BIF(**STAGES)])
    trainer = L.Trainer(max_epochs=3, callbacks=[influence], logger=False, enable_checkpointing=False, **QUIET)
    model = Model()
    with pytest.warns(UserWarning, match="BIF failed: ArithmeticError: stop The report holds the rest"):
        trainer.fit(model, *ready)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), model.state_dict().values(), strict=True))
    assert influence.report is not None and [found.at for found in influence.report.stages("BIF")] == [2, "end"]
    assert [note for note in influence.report.run.notes if "BIF" in note] == ["BIF failed: ArithmeticError: stop"]


@pytest.mark.long
def test_chains_can_be_run_after_the_fit(tmp_path: Path) -> None:
    model, report, trainer = fit([FINE(), BIF(**SHORT_CHAINS)], **QUIET)  # type: ignore[arg-type]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = run_bif(trainer, model, BIF(**SHORT_CHAINS))  # type: ignore[arg-type]
    assert_same(report.bif, found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    both = InfluenceReport(report.scores, report.run).with_attributions(found)
    assert_same(InfluenceReport.load(both.save(tmp_path)).bif, found)
    few = run_bif(trainer, model, BIF(**SHORT_CHAINS, rows=10), report=report)  # type: ignore[arg-type]
    assert set(np.argsort(-np.abs(report.scores.mu[:, 0]), kind="stable")[:4]) <= set(few.rows)


class Data(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.ready = loaders()

    def train_dataloader(self) -> DataLoader[Any]:
        return self.ready[0]

    def val_dataloader(self) -> DataLoader[Any]:
        return self.ready[1]


@pytest.mark.long
def test_chains_can_be_run_from_a_checkpoint(tmp_path: Path) -> None:
    _, report, trainer = fit([FINE(), BIF(**SHORT_CHAINS)], **QUIET)  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    fresh = L.Trainer(logger=False, enable_checkpointing=False, **QUIET)
    again = Model.load_from_checkpoint(tmp_path / "it.ckpt")
    assert_same(report.bif, run_bif(fresh, again, BIF(**SHORT_CHAINS), datamodule=Data()))  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="0 training loaders were found; pass train_dataloaders="):
        run_bif(L.Trainer(logger=False, enable_checkpointing=False, **QUIET), again, BIF(**SHORT_CHAINS))  # type: ignore[arg-type]
    train, val = loaders()
    explicit = run_bif(fresh, again, BIF(**SHORT_CHAINS), train_dataloaders=train, val_dataloaders=val)  # type: ignore[arg-type]
    assert_same(report.bif, explicit)
    assert again._trainer is None
