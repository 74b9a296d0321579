"""Chains at the end of a fit: a part of the report, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_utilities.core.imports import RequirementCache
from rich.console import Console

from ine_callback import BIF, FINE, CallableQuery, InfluenceCallback, InfluenceReport, Query
from ine_callback.errors import InfluenceError
from ine_callback.report import ReportError
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import QUIET, ROWS, SHORT_CHAINS, Model, fit

NO_RICH_BAR = pytest.mark.skipif(
    bool(RequirementCache("lightning<2.5.3") and RequirementCache("rich>=14.1")),
    reason="RichProgressBar of lightning<2.5.3 needs rich<14.1",
)


def test_chains_change_nothing_else() -> None:
    alone, report, one = fit([FINE()], **QUIET)
    model, both, other = fit([FINE(), BIF(**SHORT_CHAINS)], **QUIET)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.rand(3), torch.rand(3)) is False and alone.seen == model.seen
    assert one.callback_metrics.keys() == other.callback_metrics.keys()
    assert all(torch.equal(one.callback_metrics[key], other.callback_metrics[key]) for key in one.callback_metrics)
    assert np.array_equal(report.scores.mu, both.scores.mu) and not report.attributions
    assert both.bif.scores.shape == (ROWS, 1) and np.isfinite(both.bif.scores).all()
    assert not [note for note in both.bif.notes if "one by one" in note]  # metrics before and after the loss do not run
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.long
def test_rows_are_dataset_indices_and_queries_the_callbacks() -> None:
    queries = {"val": "val", "m": Query.margin("val"), "self": "self"}
    _, report, _ = fit([FINE(), BIF(**SHORT_CHAINS, rows=[90, 4, 17])], queries=queries, **QUIET)  # type: ignore[arg-type]
    _, whole, _ = fit([FINE(), BIF(**SHORT_CHAINS)], queries=queries, **QUIET)  # type: ignore[arg-type]
    assert report.bif.rows.tolist() == [90, 4, 17] and [q.name for q in report.bif.queries] == ["val", "m"]
    assert np.allclose(report.bif.scores, whole.bif.scores[[90, 4, 17]], atol=1e-5)
    _, some, _ = fit([FINE(), BIF(**SHORT_CHAINS, rows=10)], **QUIET)  # type: ignore[arg-type]
    extreme = np.argsort(-np.abs(some.scores.mu[:, 0]), kind="stable")[:5]
    assert len(some.bif.rows) == 10 and set(extreme) <= set(some.bif.rows)
    assert "10 of 96 rows" in some.bif.notes[0]


@pytest.mark.parametrize("bar", [pytest.param(RichProgressBar, marks=NO_RICH_BAR), TQDMProgressBar])
def test_progress_is_shown_in_the_trainers_bar(bar: Any, capfd: pytest.CaptureFixture[str]) -> None:
    _, report, _ = fit([FINE(), BIF(**SHORT_CHAINS)], callbacks=[bar()])  # type: ignore[arg-type]
    assert len(report.attributions) == 1
    if bar is TQDMProgressBar:
        assert "BIF chains" in "".join(capfd.readouterr())


def test_what_cannot_run_leaves_the_rest_of_the_report() -> None:
    with pytest.raises(InfluenceError, match=r"losses of single rows are unknown.*loss_fn="):
        fit([FINE(), BIF(**SHORT_CHAINS)], Model(0.01, 0.01), **QUIET)  # type: ignore[arg-type]
    _, report, _ = fit([FINE(), BIF(**SHORT_CHAINS)], Model(0.01), **QUIET)  # type: ignore[arg-type]
    assert "row losses are those of validation_step" in report.bif.notes[0]
    with pytest.raises(InfluenceError, match=r"\['BIF', 'BIF'\] would have one name in the report"):
        InfluenceCallback(methods=[FINE(), BIF(), BIF()])
    with pytest.raises(InfluenceError, match="BIF has no query"):
        fit([FINE(), BIF(**SHORT_CHAINS)], queries="self", **QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize("val_extra", [0.0, 0.1])
def test_the_validation_query_is_validation_steps_own_loss(val_extra: float) -> None:
    """Not training_step's, though that can be read row by row where validation_step adds something."""
    step = CallableQuery(lambda module, batch: module.validation_step(batch, 0), "val")
    queries = {"val": "val", "step": step}
    _, report, _ = fit([FINE(), BIF(**SHORT_CHAINS)], Model(0.0, val_extra), queries, **QUIET)  # type: ignore[arg-type]
    assert np.allclose(report.bif.scores[:, 0], report.bif.scores[:, 1], atol=1e-6)


class Stop(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_training_runs_no_chains() -> None:
    with pytest.raises(SystemExit):
        fit([FINE(), BIF(draws=10**6)], callbacks=[Stop()], **QUIET)


@pytest.mark.long
def test_saved_and_loaded(tmp_path: Path) -> None:
    _, report, _ = fit([FINE(), BIF(**SHORT_CHAINS)], dirpath=tmp_path / "it", **QUIET)  # type: ignore[arg-type]
    again = InfluenceReport.load(tmp_path / "it").bif
    assert_same(again, report.bif)
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(report)
    text = console.export_text()
    assert "Bayesian influence (BIF)" in text and "rank agreement" in text and "Most harmful" in text
    (tmp_path / "it" / "attributions.parquet").write_bytes(b"x")
    with pytest.raises(ReportError, match=r"attributions\.parquet"):
        InfluenceReport.load(tmp_path / "it")
    InfluenceReport(report.scores, report.run).save(tmp_path / "it")  # a report without chains leaves none behind
    assert InfluenceReport.load(tmp_path / "it").attributions == () and not list((tmp_path / "it").glob("attribution*"))
