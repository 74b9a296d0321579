"""A fit whose methods all run on the trained model: no hook reads its passes, no f-INE score is in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import BIF, FINE, IF, InfluenceCallback, InfluenceReport
from ine_callback.cli import main
from ine_callback.errors import InfluenceError
from ine_callback.methods import FitContext, FitEndMethod
from ine_callback.recording.phases import Phase
from ine_callback.scores import Attribution

ROWS, BATCH, EPOCHS = 24, 8, 2
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "max_epochs": EPOCHS,
}


class Net(L.LightningModule):
    """A classifier with dropout, so that a random number too many would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.hooks: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.hooks.append(sum(len(each._forward_hooks) + len(each._backward_hooks) for each in self.modules()))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Squares(FitEndMethod):
    """A toy: the squared norm of each row's gradient."""

    name = "squares"

    def run(self, context: FitContext) -> Attribution:
        assert context.scores is None and context.factors is None and context.gradient_sample is None
        found = torch.cat([gradients.squared_norms() for _, gradients in context.per_sample()])
        return Attribution(self.name, np.arange(context.rows), context.infos, found[:, None].double().numpy())


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def fit(callbacks: list[L.Callback], ckpt_path: str | None = None, **options: Any) -> Net:
    module, items = Net(), TensorDataset(*data())
    torch.manual_seed(7)
    trainer = L.Trainer(callbacks=callbacks, **QUIET | options)
    trainer.fit(module, DataLoader(items, BATCH, shuffle=True), DataLoader(items, BATCH), ckpt_path=ckpt_path)
    return module


def bif() -> BIF:
    return BIF(draws=20, chains=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [bif, Squares], ids=["BIF", "a toy method"])
def test_training_is_bit_identical_and_no_hook_reads_it(method: Callable[[], FitEndMethod]) -> None:
    callback = InfluenceCallback("val", methods=[method()], on_error="raise")
    recorded, plain = fit([callback]), fit([])
    for one, other in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert recorded.hooks == plain.hooks == [0] * len(plain.hooks)
    assert callback.report is not None and callback.report.attributions[0].scores.shape == (ROWS, 1)


class Numbered(Net):
    """Its batches hold the rows' numbers too; the same network whatever reads them."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)

    validation_step = training_step


def fit_numbered(row_fn: Callable[[Any], Tensor] | None, methods: list[Any]) -> InfluenceReport:
    items = TensorDataset(*data(), torch.arange(ROWS))
    callback = InfluenceCallback("val", methods, row_fn=row_fn, num_rows=ROWS, on_error="raise")
    torch.manual_seed(7)
    trainer = L.Trainer(callbacks=[callback], **QUIET)
    trainer.fit(Numbered(), DataLoader(items, BATCH, shuffle=True), DataLoader(items, BATCH))
    assert callback.report is not None
    return callback.report


@pytest.mark.filterwarnings("ignore")
def test_row_fn_that_returns_dataset_indices_changes_nothing() -> None:
    methods = [Squares(), bif()]
    named, read = fit_numbered(lambda batch: batch[2], methods), fit_numbered(None, methods)
    for one, other in zip(named.attributions, read.attributions, strict=True):
        assert np.array_equal(one.scores, other.scores) and np.array_equal(one.rows, other.rows)
    assert np.array_equal(named.scores.mean_loss, read.scores.mean_loss)


@pytest.mark.parametrize(
    ("row_fn", "why"),
    [
        (lambda batch: ROWS - 1 - batch[2], r"row_fn names the rows \[23, 11, 0\] for the items \[0, 12, 23\]"),
        (lambda batch: batch["id"], r"row_fn fails for a batch of the items \[0, 12, 23\] \(TypeError"),
    ],
    ids=["other ids", "fails"],
)
@pytest.mark.filterwarnings("ignore")
def test_row_fn_that_returns_other_ids_is_refused_before_training(row_fn: Callable[[Any], Tensor], why: str) -> None:
    """A method reads items by their index, and its scores would be those of other rows."""
    with pytest.raises(InfluenceError, match=f"squares reads training rows by their index, but {why}"):
        fit_numbered(row_fn, [Squares()])


class Augmented(TensorDataset):
    """Rows with noise from a generator of the dataset's."""

    def __init__(self) -> None:
        super().__init__(*data())
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.tensors[0][row] + torch.rand(4, generator=self.generator), self.tensors[1][row]


@pytest.mark.filterwarnings("ignore")
def test_methods_and_queries_leave_no_trace_in_a_datasets_generator() -> None:
    weights = []
    for callbacks in ([], [InfluenceCallback({"rows": [0, 1]}, [BIF(draws=4, chains=2, at=[1, "end"])])]):
        torch.manual_seed(7)
        module, items = Net(), Augmented()
        L.Trainer(callbacks=callbacks, **QUIET).fit(module, DataLoader(items, BATCH), DataLoader(items, BATCH))
        weights.append([parameter.detach() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_processes_that_train_together_score_like_one(tmp_path: Path) -> None:
    reports = []
    for devices in (1, 2):
        module, items = Net(), TensorDataset(*data())
        module.net[2] = nn.Identity()  # dropout: other numbers in other processes
        options = {**QUIET, **({"strategy": "ddp_fork", "devices": 2} if devices == 2 else {})}
        folder = tmp_path / str(devices)
        callback = InfluenceCallback(
            "val", methods=[Squares(), BIF(draws=20, chains=4), IF(damping="run")], dirpath=folder, on_error="raise"
        )
        trainer = L.Trainer(callbacks=[callback], **options)
        trainer.fit(module, DataLoader(items, ROWS // devices), DataLoader(items, BATCH))  # all rows a step
        reports.append(InfluenceReport.load(folder))
    one, two = reports
    assert {each.method for each in two.attributions} == {"squares", "BIF", "IF-EKFAC"}
    for method in ("squares", "IF-EKFAC"):
        scores = [report.attribution(method).scores for report in (one, two)]
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-4 * np.abs(scores[0]).max())
    assert two.attribution("BIF").scores.shape == (ROWS, 1)  # its chains draw other numbers than those of one process
    assert np.array_equal(one.observations, two.observations)


@pytest.mark.filterwarnings("ignore")
def test_chains_that_processes_cannot_share_are_refused_before_training(tmp_path: Path) -> None:
    callback = InfluenceCallback("val", methods=[bif()], dirpath=tmp_path)
    with pytest.raises(Exception, match="BIF: chains=2 cannot be divided among 2 processes; take a multiple of 4"):
        fit([callback], strategy="ddp_fork", devices=2)


@pytest.mark.filterwarnings("ignore")
def test_rows_have_observations_and_mean_losses_as_with_f_ine() -> None:
    alone, both = (InfluenceCallback("val", methods=methods) for methods in ([Squares()], [FINE(), bif()]))
    fit([alone]), fit([both])
    assert alone.report is not None and both.report is not None
    assert alone.report.queries == () and alone.report.run.steps == both.report.run.steps == EPOCHS * ROWS // BATCH
    assert np.array_equal(alone.report.observations, both.report.observations)
    assert np.array_equal(alone.report.scores.mean_loss, both.report.scores.mean_loss)
    assert np.isfinite(alone.report.scores.mean_loss).all() and len(alone.report.suspect_labels()) == ROWS
    assert not alone.report.run.incomplete and alone.report.run.config["methods"] == ["ObservationCounts"]


@pytest.mark.filterwarnings("ignore")
def test_accumulated_batches_are_one_observation_each() -> None:
    callback = InfluenceCallback("val", methods=[Squares()], on_error="raise")
    fit([callback], accumulate_grad_batches=3)
    assert callback.report is not None and callback.report.run.steps == EPOCHS
    assert set(callback.report.observations.tolist()) == {EPOCHS}


@pytest.mark.filterwarnings("ignore")
def test_the_report_survives_saving_and_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = InfluenceCallback("val", methods=[Squares()], dirpath=tmp_path, on_error="raise")
    fit([callback])
    again, report = InfluenceReport.load(tmp_path), callback.report
    assert report is not None and again.queries == ()
    assert np.array_equal(again.observations, report.observations)
    assert np.array_equal(again.scores.mean_loss, report.scores.mean_loss)
    for text in (str(again), again.to_markdown(), again._repr_html_()):
        assert "No query was scored by f-INE" in text
    again.write_html(tmp_path / "report.html", samples=TensorDataset(*data()))
    assert "No query was scored by f-INE" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert again.summary()["recommended_query"] is None
    folder = str(tmp_path)
    assert [
        main(["show", folder]),
        main(["show", folder, "--json"]),
        main(["show", folder, "--method", "squares"]),
    ] == [0] * 3
    assert main(["export", folder, "--format", "markdown"]) == 0
    capsys.readouterr()
    for wrong in (["show", folder, "--top", "3"], ["export", folder, "--format", "csv"], ["compare", folder, folder]):
        assert main(wrong) == 2 and "no query was scored by f-INE" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "ask",
    [
        lambda report: report.top(),
        lambda report: report.unlike_batch_mates(),
        lambda report: report.recommended_query,
        lambda report: report.info("val"),
        lambda report: report.to_arrow(),
        lambda report: report.figure(),
        lambda report: report.compare(report),
    ],
)
def test_a_question_about_a_query_names_the_remedy(ask: Callable[[InfluenceReport], Any]) -> None:
    callback = InfluenceCallback("val", methods=[Squares()])
    fit([callback], max_epochs=1)
    assert callback.report is not None
    with pytest.raises(KeyError, match=r"no query was scored by f-INE.*methods=\[FINE\(\), ...\]"):
        ask(callback.report)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_fit_counts_on(tmp_path: Path) -> None:
    whole, first, second = (InfluenceCallback("val", methods=[Squares()], on_error="raise") for _ in range(3))
    fit([whole])
    module, items = Net(), TensorDataset(*data())
    trainer = L.Trainer(callbacks=[first], **QUIET | {"max_epochs": 1})
    trainer.fit(module, DataLoader(items, BATCH), DataLoader(items, BATCH))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit([second], ckpt_path=str(tmp_path / "last.ckpt"))
    assert whole.report is not None and second.report is not None
    assert np.array_equal(second.report.observations, whole.report.observations)
    assert second.report.run.steps == whole.report.run.steps
    assert any("resumed at step" in note for note in second.report.run.notes)


def test_loggers_get_what_there_is(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    callback = InfluenceCallback("val", methods=[Squares()], on_error="raise")
    fit([callback], logger=CSVLogger(tmp_path))
    text = next(tmp_path.rglob("metrics.csv")).read_text(encoding="utf-8")
    assert "influence/rows_seen" in text and "flagged" not in text


def test_the_recording_counts_from_its_first_step_and_stops_at_the_end() -> None:
    phases: list[Phase] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert callback._recorder is not None
            phases.append(callback._recorder.guard.phase)

    callback = InfluenceCallback("val", methods=[Squares()], on_error="raise")
    fit([callback, Watch()], max_epochs=1)
    assert set(phases) == {Phase.RECORDING}
    assert callback._recorder is not None and callback._recorder.guard.phase is Phase.STOPPED
