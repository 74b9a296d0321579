"""Bad input and failures: each ends in a message with the class, the value and the remedy, and no training is lost.

What can be known before the first step is raised before it. What happens later, under on_error="warn", is warned about
and told in the report, and the weights are bit-identical to those of a run without the callback.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ine_callback import FINE, InfluenceCallback, InfluenceReport, Query, Recorder
from ine_callback.capture import Capture
from ine_callback.errors import RowsError
from ine_callback.optimizers.clipping import Clipping
from ine_callback.recording.backward import BackwardPasses
from ine_callback.recording.coverage import Coverage
from ine_callback.recording.steps import OptimizerSteps
from ine_callback.scoring.signals import Signals
from tests.helpers.accidents import Accident, accident

ROWS, STEPS = 48, 12  # two epochs of six batches of eight


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Stream(IterableDataset):
    """The training rows without indices, each with its own number as third part."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        x, y = data().tensors
        return iter((x[k], y[k], k) for k in range(len(x)))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(ROWS, 5, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator))


def loader(**options: Any) -> DataLoader:
    return DataLoader(data(), batch_size=8, shuffle=True, **options)


def fit(*callbacks: L.Callback, train: Any = None, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=2, callbacks=[*callbacks], enable_model_summary=False, **quiet, **options)
    trainer.fit(model, loader() if train is None else train, DataLoader(data(), batch_size=16))
    return model


@cache
def plain(train: Callable[[], Any], **options: Any) -> Net:
    """Trained without the callback, which comes out the same each time."""
    return fit(train=train(), **options)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# -- what can be known beforehand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"queries": 3}, ["InfluenceCallback", "3", "int", "'val'"]),
        ({"queries": "vall"}, ["InfluenceCallback", "'vall'", "'val'"]),
        ({"queries": []}, ["InfluenceCallback", "[]", "'val'"]),
        ({"queries": {"a": None}}, ["InfluenceCallback", "None", "DataLoader"]),
        ({"queries": torch.nn.Linear(1, 1)}, ["InfluenceCallback", "Linear", "'val'"]),
        ({"queries": ["val", "val"]}, ["InfluenceCallback", "'val'", "mapping"]),
        ({"methods": []}, ["InfluenceCallback", "methods=[]", "FINE()"]),
        ({"methods": ["fine"]}, ["InfluenceCallback", "'fine'", "FINE()"]),
        ({"refresh_every": 0}, ["InfluenceCallback", "refresh_every=0", "at least 1"]),
        ({"refresh_every": 2.5}, ["InfluenceCallback", "refresh_every=2.5", "integer"]),
        ({"max_dim": -1}, ["InfluenceCallback", "max_dim=-1", "at least 1"]),
        ({"max_query_rows": 0}, ["InfluenceCallback", "max_query_rows=0", "at least 1"]),
        ({"on_error": "ignore"}, ["InfluenceCallback", "'ignore'", "'warn'"]),
        ({"uncaptured": "skip"}, ["InfluenceCallback", "'skip'", "'fallback'"]),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_refused_at_once(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="InfluenceCallback") as caught:
        InfluenceCallback(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"estimator": "mean"}, ["mean", "gaussian"]), ({"null_draws": 0}, ["null_draws=0", "at least 1"])],
)
def test_a_wrong_argument_of_the_method_is_refused_at_once(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="FINE") as caught:
        FINE(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def no_gradient(module: Net, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1]).detach()


def a_vector(module: Net, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


EMPTY = DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ({"mine": EMPTY}, ["InfluenceCallback", "DataLoader", "empty", "at least one"]),
        ({"mine": []}, ["InfluenceCallback", "list", "empty", "at least one"]),
        ({"mine": [0, ROWS]}, ["InfluenceCallback", str([ROWS]), f"0 to {ROWS - 1}"]),
        ([no_gradient], ["no_gradient", "no gradient", "detach"]),
        ([a_vector], ["a_vector", f"({ROWS},)", "mean"]),
        ([lambda module, batch: 1.5], ["lambda", "float", "scalar tensor"]),
        ([Query.margin({"x": torch.zeros(2, 5)})], ["MarginQuery", "dict", "forward="]),
        ([Query.per_class(torch.zeros(2, 5))], ["PerClassQuery", "label="]),
    ],
    ids=["empty loader", "empty list", "unknown row", "no gradient", "vector", "float", "no pair", "no label"],
)
def test_a_query_that_cannot_work_ends_before_the_first_step(queries: Any, words: list[str], on_error: Any) -> None:
    callback = InfluenceCallback(queries=queries, on_error=on_error)
    stepped = Steps()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        fit(callback, stepped)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert stepped.count == 0 and callback.report is None


class Steps(L.Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


def test_val_without_a_validation_loader_ends_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"InfluenceCallback: query 'val' needs a validation loader.*queries=\{"):
        fit(InfluenceCallback("val"), limit_val_batches=0)


def test_an_iterable_dataset_needs_row_fn() -> None:
    stream, stepped = DataLoader(Stream(), batch_size=8), Steps()
    with pytest.raises(ValueError, match=r"InfluenceCallback: the iterable dataset Stream .* row_fn="):
        fit(InfluenceCallback("self"), stepped, train=stream)
    assert stepped.count == 0
    assert "_get_iterator" not in stream.__dict__
    callback = InfluenceCallback("self", row_fn=lambda batch: batch[2], on_error="raise")  # the remedy works
    fit(callback, train=stream)
    assert callback.report is not None and (callback.report.observations == 2).all()


def test_after_a_refusal_the_same_trainer_parts_train_as_if_nothing_had_been() -> None:
    train = loader()
    with pytest.raises(ValueError, match="empty"):
        fit(InfluenceCallback({"mine": EMPTY}), train=train)
    assert same(fit(train=train), fit())


# -- what goes wrong during the run ------------------------------------------------------------------------------------


def survives(
    callback: InfluenceCallback, told: str, train: Callable[[], Any] = loader, **options: Any
) -> InfluenceReport | None:
    """Fits under "warn": a warning with ``told``, weights as without the callback. Returns the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded = fit(callback, train=train(), **options)
    own = [str(w.message) for w in caught if "InfluenceCallback" in str(w.message)]
    assert any(re.search(told, message) for message in own), own
    assert recorded.steps == STEPS and same(recorded, plain(train, **options))
    return callback.report


def wrong_rows(after: int, rows: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """A row_fn that turns wrong after some batches."""
    calls = []

    def row_fn(batch: Any) -> Any:
        calls.append(0)
        return batch[2] if len(calls) <= after else rows(batch[2])

    return row_fn


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=8)


WRONG_ROWS = {
    "too few": (lambda rows: rows[:5], "5"),
    "too many": (lambda rows: torch.cat([rows, rows]), "16"),
    "none": (lambda rows: rows[:0], r"\(0,\)"),
    "a matrix": (lambda rows: rows[:, None], r"\(8, 1\)"),
    "floats": (lambda rows: rows.float(), "float32"),
    "negative": (lambda rows: rows - 100, "-"),
    "no tensor": (lambda rows: "seven", "seven|str"),
    "an error": (lambda rows: rows[99], "index 99"),
}


@pytest.mark.parametrize("after", [0, 4], ids=["first batch", "later"])
@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_that_are_named_wrongly(case: str, after: int) -> None:
    rows, told = WRONG_ROWS[case]
    if after and case in ("too few", "too many"):  # only these batches are left out (tests/data/test_row_fn.py)
        pytest.skip("does not end the recording")
    callback = InfluenceCallback("self", row_fn=wrong_rows(after, rows), num_rows=ROWS)
    report = survives(callback, told, train=stream)
    if after:
        assert report is not None and report.run.steps == after
        assert any(f"stopped after {after} steps" in note for note in report.run.notes), report.run.notes
        assert (
            int(report.observations.sum()) == 8 * after and np.isfinite(report.scores.mu[report.observations > 0]).any()
        )
    with pytest.raises(Exception, match=told):
        fit(InfluenceCallback("self", row_fn=wrong_rows(after, rows), num_rows=ROWS, on_error="raise"), train=stream())


def test_signals_that_are_not_finite_are_left_out_and_counted() -> None:
    calls = []

    def breaks(module: Net, batch: Any) -> Tensor:
        calls.append(0)
        loss = F.cross_entropy(module(batch[0]), batch[1])
        return loss * float("nan") if len(calls) > 2 else loss  # the check, the first directions, then a refresh

    callback = InfluenceCallback([breaks, "self"], refresh_every=3, on_error="raise")
    recorded = fit(callback)
    report = callback.report
    assert same(recorded, fit()) and report is not None
    lost = report.run.nonfinite["breaks"]
    assert 0 < lost < 8 * STEPS and lost % 8 == 0 and "self" not in report.run.nonfinite
    assert np.isfinite(report.scores.mu).all() and (report.observations == 2).all()
    assert f"{lost}" in str(report)  # the reader of the table is told, too


def test_a_row_of_nan_ruins_the_model_but_not_the_report() -> None:
    def ruined() -> DataLoader:
        rows = data()
        rows.tensors[0][7] = float("nan")
        return DataLoader(rows, batch_size=8, shuffle=True)

    callback = InfluenceCallback("self", on_error="raise")
    recorded, plain = fit(callback, train=ruined()), fit(train=ruined())
    for a, b in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and a.isnan().any()
    assert callback.report is not None and callback.report.run.nonfinite["self"] > 0
    assert "non-finite" in str(callback.report)


HOOKS = [
    (BackwardPasses, "start_batch"),
    (BackwardPasses, "see"),
    (BackwardPasses, "receive"),
    (BackwardPasses, "settle"),
    (BackwardPasses, "end_batch"),
    (BackwardPasses, "_begin_pass"),
    (BackwardPasses, "_end_pass"),
    (Recorder, "_ready"),
    (OptimizerSteps, "measure_changes"),
    (OptimizerSteps, "end"),
    (Clipping, "mark"),
    (Clipping, "change"),
    (Clipping, "forget"),
    (Coverage, "verify"),
    (Coverage, "fallback"),
    (Capture, "start_batch"),
    (Signals, "receive"),
    (Signals, "refresh"),
    (Signals, "settle"),
    (FINE, "update"),
]


@pytest.mark.parametrize("after", [0, 1], ids=["first call", "second call"])
@pytest.mark.parametrize(("owner", "name"), HOOKS, ids=[f"{owner.__name__}.{name}" for owner, name in HOOKS])
def test_an_accident_in_any_hook_never_ends_training(owner: type, name: str, after: int) -> None:
    if name == "verify" and after:
        pytest.skip("called once a run")
    clipped = {"gradient_clip_val": 0.5}
    with accident(owner, name, after):
        report = survives(InfluenceCallback(["val", "self"], refresh_every=2), "Accident: the roof fell in", **clipped)
        assert report is not None and any("the roof fell in" in note for note in report.run.notes)
        with pytest.raises((Accident, RowsError), match="the roof fell in"):  # the latter: it cost every layer
            fit(InfluenceCallback(["val", "self"], refresh_every=2, on_error="raise"), **clipped)


@pytest.mark.parametrize(
    ("owner", "name", "told"), [(FINE, "compute", "report was lost"), (InfluenceReport, "save", "could not be saved")]
)
def test_an_accident_after_training_loses_the_report_only(owner: type, name: str, told: str) -> None:
    with accident(owner, name, 0):
        survives(InfluenceCallback("self", dirpath="report"), f"{told}.*Accident")
        with pytest.raises(Accident):
            fit(InfluenceCallback("self", dirpath="report", on_error="raise"))


def test_a_folder_that_cannot_be_written_loses_the_file_but_not_the_report(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should go")
    report = survives(InfluenceCallback("self", dirpath=tmp_path / "taken"), "taken")
    assert report is not None and (report.observations == 2).all()


class Stop(L.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise self.error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("the disk is full")], ids=lambda e: type(e).__name__
)
def test_an_interrupted_run_leaves_a_partial_report_and_everything_as_it_was(error: BaseException) -> None:
    train, callback = loader(), InfluenceCallback(["val", "self"], dirpath="report", on_error="raise")
    before = dict(train.__dict__)
    torch.manual_seed(0)
    model = Net()
    trainer = L.Trainer(
        **{"max_epochs": 2, "callbacks": [callback, Stop(error)], "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    with pytest.raises((type(error), SystemExit)):
        trainer.fit(model, train, DataLoader(data(), batch_size=16))
    report = callback.report
    # the callback's own hook ran before Stop's, so step 5 is in
    assert report is not None and report.run.steps == 5 and int(report.observations.sum()) == 5 * 8
    assert any(type(error).__name__ in note for note in report.run.notes), report.run.notes
    assert any("5 of 12 planned steps" in note for note in report.run.notes), report.run.notes
    assert InfluenceReport.load("report").run.steps == 5
    after = {key: value for key, value in train.__dict__.items() if key != "_iterator"}
    assert after == {key: value for key, value in before.items() if key != "_iterator"}
    assert "process_dataloader" not in trainer.strategy.__dict__
    assert "convert_input" not in trainer.precision_plugin.__dict__
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    x, y = next(iter(train))
    assert x.shape == (8, 5) and y.shape == (8,)
    assert same(fit(train=train), fit())  # both the loader and the package can be used again
