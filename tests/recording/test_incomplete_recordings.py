"""What a recording could not see, its report says first: steps of one row, a recording that stopped or never began."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, InfluenceReport, Recorder
from ine_callback.report.html import page
from ine_callback.report.markdown import markdown
from ine_callback.report.table import as_text
from tests.helpers.changed_gradients import ROWS, Net, X, Y, by_rows, fit, loader, recorded, same


def report_of(kind: type[Net], batches: Any, told: str = "", **options: Any) -> InfluenceReport:
    influence = InfluenceCallback(["val", "self"], initial_weights="fixed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(kind, influence, batches, **options)
    assert not told or any(told in str(one.message) for one in caught)
    assert influence.report is not None
    return influence.report


def in_every_view(report: InfluenceReport, words: str) -> None:
    """First of all that is said, wherever a report is read."""
    assert words in as_text(report).splitlines()[1]
    assert words in markdown(report).splitlines()[2].replace("\\", "")
    assert words in repr(report) and words in report._repr_html_()
    html = page(report)
    assert words in html and html.index(words) < html.index('class="answers"')


def test_batches_of_one_row_are_told_before_and_after() -> None:
    report = report_of(Net, loader(1), "a step has a single row")
    assert np.isnan(report.scores.mu).all()
    in_every_view(report, "No row has a score")


def test_single_rows_gathered_into_a_step_are_its_rows() -> None:
    keep, _ = recorded(Net, loader(1), accumulate_grad_batches=6)
    same(keep, by_rows(Net, list))
    report = report_of(Net, loader(1), accumulate_grad_batches=6)
    assert np.isfinite(report.scores.mu).all() and not report.run.incomplete


def test_a_last_batch_of_one_row_leaves_that_row_alone() -> None:
    """In order, the last row is alone in every epoch; shuffled, it is another one each time."""
    data = TensorDataset(X[:13], Y[:13])
    report = report_of(Net, DataLoader(data, batch_size=4), max_epochs=3)
    assert np.isfinite(report.scores.mu[:12]).all() and np.isnan(report.scores.mu[12]).all()
    mixed = report_of(Net, DataLoader(data, batch_size=4, shuffle=True), max_epochs=3)
    assert np.isfinite(mixed.scores.mu).all() and (mixed.observations == 3).all()


def test_a_batch_sampler_of_single_rows_is_told_by_the_first_step() -> None:
    sampler = [[k] for k in range(ROWS)]
    batches = DataLoader(TensorDataset(X, Y), batch_sampler=sampler)
    in_every_view(report_of(Net, batches, "a step has a single row"), "No row has a score")


class Stops(Net):
    """A batch that cannot be told apart by rows comes in the middle."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 2:
            self.trainer.callbacks[0]._recorder.guard.fail(ValueError("the roof fell in; mend it"))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_recording_that_stopped_says_so_first() -> None:
    report = report_of(Stops, loader(), "steps 0-1 of 4")
    in_every_view(report, "The scores cover steps 0-1 of 4 only")
    again = InfluenceReport.load(report.save("there"))
    assert again.run.incomplete == report.run.incomplete


class Refused(Net):
    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 0:
            self.trainer.callbacks[0]._recorder.guard.fail(ValueError("the roof fell in; mend it"))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_at_the_first_batch_says_so_first() -> None:
    in_every_view(
        report_of(Refused, loader(), "Nothing was recorded"), "Nothing was recorded: ValueError: the roof fell"
    )


class Elsewhere(Net):
    """Steps of an optimizer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hidden = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def training_step(self, batch: Any, index: int) -> None:
        self.hidden.zero_grad()
        self.manual_backward(self.loss(batch))
        self.hidden.step()


@pytest.mark.filterwarnings("ignore")
def test_steps_of_another_optimizer_are_told() -> None:
    in_every_view(report_of(Elsewhere, loader()), "Nothing was recorded: no optimizer step was taken")


def test_a_recorder_that_was_never_started_does_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, rows=4)
    with recorder.batch(torch.arange(4)):
        loss = model(torch.ones(4, 2)).square().mean()
        recorder.see(loss)
        loss.backward()
        recorder.after_backward()
    optimizer.step()
    recorder.measure_clipping()
    recorder.discard()
    recorder.stop()
    assert not recorder.recording and not recorder.running and recorder.steps == 0
