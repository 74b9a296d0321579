"""What loggers get, that a poor or broken one hurts nobody, and that the user's own metrics stay what they are."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback
from ine_callback.integrations import loggers
from ine_callback.integrations.loggers import MAX_TIME_FRACTION, RunLog
from ine_callback.report import example_report

QUERY = 'some <script>"é"'  # of letters that not all loggers take
NAME = "some _script____"


@pytest.fixture(autouse=True)
def _every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So short an epoch would often go without, by the clock."""
    monkeypatch.setattr(loggers, "MAX_TIME_FRACTION", math.inf)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(told: list[Any], *callbacks: InfluenceCallback) -> L.Trainer:
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8, shuffle=True)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=told, log_every_n_steps=2, callbacks=[*callbacks], **quiet
    )
    trainer.fit(Net(), data)
    return trainer


def influence(**options: Any) -> InfluenceCallback:
    return InfluenceCallback({QUERY: [0, 1, 2, 3], "self": "self"}, **{"on_error": "raise", **options})


class Bare(Logger):
    """The least that a logger can be."""

    name, version = "bare", 0

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Broken(Bare):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("influence") for key in metrics):
            raise ConnectionError("the server is gone")


def table(logger: CSVLogger) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))


def test_tensorboard_csv_and_the_poorest_logger_get_what_they_can(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, rows, bare = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv"), Bare()
    callback = influence()
    fit([board, rows, bare], callback)
    report = callback.report
    flagged = float((report.scores.q[:, 0] <= 0.05).sum())

    found = events.EventAccumulator(board.log_dir, size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in found.Scalars("influence/rows_seen")] == [6, 12, 12]  # two epochs and the end
    assert found.Scalars(f"influence/{NAME}/flagged")[-1].value == flagged
    assert found.Tags()["images"] == [f"influence/{NAME}", "influence/self"]
    text = found.Tensors("influence/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "**48** rows" in text and "<script>" not in text
    assert (Path(board.log_dir) / "influence/scores.parquet").is_file()

    ours = [line for line in table(rows) if line["influence/rows_seen"]]
    assert len(ours) == 3 and float(ours[-1][f"influence/{NAME}/null_check_p"]) == report.scores.null_ks_p[0]
    assert [step for step, metrics in bare.metrics if "influence/rows_seen" in metrics] == [6, 12, 12]


def test_training_and_the_users_metrics_are_the_same_with_and_without(tmp_path: Path) -> None:
    ends = []
    for name, callbacks in (("with", [influence()]), ("without", [])):
        logger = CSVLogger(tmp_path / name)
        trainer = fit([logger], *callbacks)
        state = [*trainer.lightning_module.state_dict().values(), torch.get_rng_state()]
        own = [line["train_loss"] for line in table(logger) if line["train_loss"]]
        ends.append((state, own, dict(trainer.callback_metrics), dict(trainer.logged_metrics)))
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.equal(one, other)
    assert ends[0][1:] == ends[1][1:] and len(ends[0][1]) == 6


def test_a_broken_logger_costs_a_warning_and_the_others_nothing(tmp_path: Path) -> None:
    bare = Bare()
    with pytest.warns(UserWarning, match="not logged: Broken: scalars: ConnectionError: the server is gone"):
        fit([Broken(), bare], callback := influence(on_error="warn", dirpath=tmp_path / "report"))
    assert (tmp_path / "report/scores.parquet").is_file() and callback.report.rows == 48
    assert [step for step, metrics in bare.metrics if "influence/rows_seen" in metrics] == [6, 12, 12]
    with pytest.raises(ConnectionError):
        fit([Broken()], influence(dirpath=tmp_path / "other"))


def test_nothing_is_logged_when_that_is_switched_off() -> None:
    bare = Bare()
    fit([bare], influence(log_scores=False))
    assert not [metrics for _, metrics in bare.metrics if any(key.startswith("influence") for key in metrics)]


def test_scores_of_an_epoch_are_left_out_where_they_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "MAX_TIME_FRACTION", MAX_TIME_FRACTION)
    bare, asked = Bare(), []
    log = RunLog(
        L.Trainer(logger=bare, accelerator="cpu", enable_checkpointing=False), "InfluenceCallback", strict=True
    )
    scores = example_report().scores

    def made() -> Any:
        asked.append(1)
        return scores

    log.epoch(made)
    log._spent, log._began = 1.0, log._began - 0.9 / MAX_TIME_FRACTION  # a second so far, of a little less than fifty
    log.epoch(made)
    log._began -= 0.2 / MAX_TIME_FRACTION
    log.epoch(made)
    assert len(asked) == 2 and len(bare.metrics) == 2
    assert bare.metrics[0][1]["influence/self/flagged"] == 3.0


def test_weights_and_biases_gets_table_figure_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    fit([logger := WandbLogger(save_dir=tmp_path, offline=True)], influence())
    files = Path(logger.experiment.dir)
    logger.experiment.finish()
    media = sorted(path.suffix for path in (files / "media").rglob("*.*"))
    assert media == [".json", ".png", ".png"]
    until = time.monotonic() + 20  # its own process may write after finish() has returned
    while b"scores.parquet" not in (held := next(files.parent.glob("*.wandb")).read_bytes()):
        assert time.monotonic() < until, held[:100]
        time.sleep(0.1)
    assert b"influence-report" in held
    assert (tmp_path / "lightning_logs" / logger.version / "influence/scores.parquet").is_file()
    assert {each.name for each in tmp_path.iterdir()} == {"lightning_logs", "wandb"}  # nothing where all runs meet


def test_mlflow_gets_figure_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    fit([logger := MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")], influence())
    names = {each.path for each in logger.experiment.list_artifacts(logger.run_id, "influence")}
    assert {"influence/scores.parquet", f"influence/{NAME}.png"} <= names
    assert len(logger.experiment.get_metric_history(logger.run_id, "influence/rows_seen")) == 3
    kept = tmp_path / "mlruns" / logger.experiment_id / logger.run_id / "influence/scores.parquet"
    assert kept.is_file() and not (tmp_path / "mlruns/influence").exists()  # which would be an experiment to MLflow


def test_mlflow_s_database_gets_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no database")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=(tmp_path / "kept").as_uri())
    fit([logger], influence())
    names = {each.path for each in logger.experiment.list_artifacts(logger.run_id, "influence")}
    assert {"influence/scores.parquet", f"influence/{NAME}.png"} <= names
    assert len(logger.experiment.get_metric_history(logger.run_id, "influence/rows_seen")) == 3
