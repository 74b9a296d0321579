"""A training that was ended and resumed from its checkpoint: the scores of the one that was not, to the last bit."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.resume import Remembers
from ine_callback import BIF, FINE, InfluenceCallback, InfluenceReport
from ine_callback.recording.accumulators import RowAccumulators
from ine_callback.scores import QueryInfo
from tests.helpers.accidents import accident
from tests.helpers.identical import differing, left_behind, unequal

from .data import Stream
from .harness import QUIET
from .optimizers import GAN, Together, adam
from .options import with_adamw
from .regime import BATCH, ROWS, Data, Regime, vectors
from .together import loaded, trained

EVERY = 3  # steps between checkpoints


class Killed(Exception):
    """What ends the training."""


class Killer(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def by_epoch(items: Dataset[Any]) -> DataLoader[Any]:
    """An order that follows from the number of the epoch, so that it can be resumed at an epoch's end."""
    return DataLoader(items, BATCH, sampler=DistributedSampler(items, 1, 0, seed=5))


def remembering(items: Dataset[Any]) -> DataLoader[Any]:
    return Remembers(items, BATCH, sampler=DistributedSampler(items, 1, 0, seed=5))


def run(
    regime: Regime, folder: Path, kill: int | None, resume: bool, **options: Any
) -> tuple[InfluenceReport | None, dict[str, list[Any]]]:
    """Trains (on), from the last checkpoint in ``folder`` if asked to; returns the report and what was left."""
    L.seed_everything(11, verbose=False)
    data, module = regime.data(), regime.module()
    settings = {"queries": ["val", "self"], "refresh_every": 4, "curvature_every": 1, "on_error": "raise"}
    influence = InfluenceCallback(**settings | regime.influence | options)
    keep = ModelCheckpoint(folder, every_n_train_steps=EVERY, save_last=True, save_top_k=-1)
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 4, **regime.trainer()}
    callbacks = [influence, keep, *options.pop("callbacks", []), *([] if kill is None else [Killer(kill)])]
    trainer = L.Trainer(**options, callbacks=callbacks)
    torch.manual_seed(23)
    try:
        trainer.fit(module, data.train, data.val, ckpt_path=folder / "last.ckpt" if resume else None)
    except Killed:
        assert kill is not None
    left = left_behind(trainer.lightning_module, trainer.optimizers[0])
    left["optimizer"] = [leaf for each in trainer.optimizers for leaf in tree_leaves(each.state_dict())]
    return influence.report, {kind: left[kind] for kind in ("parameters and buffers", "optimizer")}


def ordered() -> Data:
    return vectors(by_epoch)


REGIMES = [
    Regime("sgd", "resumed", data=ordered),
    Regime("adamw", "resumed", with_adamw, ordered),
    Regime("no discount", "resumed", data=ordered, influence={"discount": False}),
    Regime("fixed weights", "resumed", data=ordered, influence={"initial_weights": "fixed"}),
    Regime("accumulated", "resumed", data=ordered, trainer=lambda: {"accumulate_grad_batches": 2, "max_epochs": 8}),
    Regime("bf16-mixed", "resumed", data=ordered, trainer=lambda: {"precision": "bf16-mixed"}),
    Regime("max_threshold", "resumed", data=ordered, influence={"methods": [FINE("max_threshold")]}),
]


def resumed_alike(regime: Regime, folder: Path, stop: int) -> tuple[InfluenceReport, InfluenceReport]:
    """Reports of a whole training and of one that was stopped and resumed, which must leave the same."""
    whole, left = run(regime, folder / "whole", None, False)
    run(regime, folder / "parts", stop, False)
    resumed, again = run(regime, folder / "parts", None, True)
    assert whole is not None and resumed is not None
    assert not differing(left, again)
    assert not unequal(whole, resumed)
    assert resumed.run.steps == whole.run.steps
    return whole, resumed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_resumed_at_the_end_of_an_epoch(regime: Regime, tmp_path: Path) -> None:
    """Four batches an epoch, checkpoints every three steps: the one after step 12 is at the end of the third epoch."""
    _, resumed = resumed_alike(regime, tmp_path, stop=13)
    assert "resumed at step 12 from a checkpoint" in resumed.run.notes
    assert not any("inside of an epoch" in note for note in resumed.run.notes)


BY_HAND = [
    Regime("two optimizers", "resumed", Together, ordered),
    Regime("GAN, toggled", "resumed", lambda: GAN(toggle=True, first="generator"), ordered),
    Regime("GAN, not toggled", "resumed", lambda: GAN((adam, adam)), ordered),
    Regime("GAN, no discount", "resumed", GAN, ordered, influence={"discount": False}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("regime", BY_HAND, ids=lambda regime: regime.name)
def test_several_optimizers_resumed(regime: Regime, tmp_path: Path) -> None:
    """Lightning counts both optimizers' steps: eight an epoch, a checkpoint at the end of the third."""
    whole, resumed = resumed_alike(regime, tmp_path, stop=26)
    assert whole.run.steps == 16
    assert resumed.run.schedule == whole.run.schedule


@pytest.mark.filterwarnings("ignore")
def test_resumed_inside_of_an_epoch_with_a_loader_that_goes_on_where_it_was(tmp_path: Path) -> None:
    regime = Regime("remembers", "resumed", data=lambda: vectors(remembering))
    whole, left = run(regime, tmp_path / "whole", None, False)
    run(regime, tmp_path / "parts", 7, False)
    run(regime, tmp_path / "parts", 11, True)
    resumed, again = run(regime, tmp_path / "parts", None, True)
    assert whole is not None and resumed is not None
    assert not differing(left, again) and not unequal(whole, resumed)
    notes = [note for note in resumed.run.notes if "resumed" in note]
    assert notes == ["resumed at step 6 from a checkpoint", "resumed at step 9 from a checkpoint"]


class Visits(L.Callback):
    """Counts the visits of every row in the steps of one process."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        self.steps.append([int(row) for row in batch[2]])


@pytest.mark.filterwarnings("ignore")
def test_resumed_inside_of_an_epoch_with_a_plain_loader_counts_what_was_trained_on(tmp_path: Path) -> None:
    parts = [Visits(), Visits()]
    regimes = [Regime("plain", "resumed", trainer=lambda v=v: {"callbacks": [v]}) for v in parts]
    run(regimes[0], tmp_path, 7, False)
    resumed, _ = run(regimes[1], tmp_path, None, True)
    assert resumed is not None
    expected = np.zeros(ROWS, dtype=np.int64)
    for rows in [*parts[0].steps[:6], *parts[1].steps]:
        np.add.at(expected, rows, 1)
    assert (resumed.observations == expected).all() and resumed.run.steps == 6 + len(parts[1].steps)
    assert any("inside of an epoch with a loader that does not know" in note for note in resumed.run.notes)


@pytest.mark.filterwarnings("ignore")
def test_a_stream_of_unknown_length_goes_on(tmp_path: Path) -> None:
    regime = Regime(
        "stream",
        "resumed",
        data=lambda: vectors(lambda items: DataLoader(Stream(items), BATCH)),
        influence={"row_fn": lambda batch: batch[2]},
        trainer=lambda: {"max_epochs": 6},
    )
    whole, left = run(regime, tmp_path / "whole", None, False)
    run(regime, tmp_path / "parts", 13, False)
    resumed, again = run(regime, tmp_path / "parts", None, True)
    assert whole is not None and resumed is not None
    assert not differing(left, again) and not unequal(whole, resumed) and resumed.rows == ROWS


@pytest.mark.filterwarnings("ignore")
def test_chains_of_earlier_stages_are_kept(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [FINE(), BIF(at=[1, 4, "end"], chains=2, draws=8, batch_size=6, curvature_rows=12)]

    regime = Regime("bif", "resumed", data=ordered)
    whole, _ = run(regime, tmp_path / "whole", None, False, methods=methods())
    run(regime, tmp_path / "parts", 13, False, methods=methods())
    resumed, _ = run(regime, tmp_path / "parts", None, True, methods=methods())
    assert whole is not None and resumed is not None
    assert [found.at for found in resumed.stages("BIF")] == [1, 4, "end"] == [found.at for found in whole.stages("BIF")]
    for one, other in zip(whole.stages("BIF"), resumed.stages("BIF"), strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"queries": ["val"]},
            r"the checkpoint holds .*'self'.* this run has .*resume with the same data and settings",
        ),
        ({"methods": [FINE("auc")]}, "estimator='gaussian'.*'auc'.*resume with the same settings"),
    ],
    ids=["queries", "estimator"],
)
def test_another_recordings_checkpoint_is_not_taken_up(options: Any, told: str, tmp_path: Path) -> None:
    regime = Regime("other", "resumed", data=ordered)
    run(regime, tmp_path / "one", 13, False)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    with pytest.warns(UserWarning, match=f"began at step 12 of a resumed run; earlier steps are missing .*{told}"):
        resumed, _ = run(regime, tmp_path / "one", None, True, on_error="warn", **options)
    assert resumed is not None and resumed.run.steps == 4
    alone, _ = run(regime, tmp_path / "other", None, True, on_error="warn", queries="val")  # refused before all else
    assert alone is not None and (resumed.scores.mean_loss == alone.scores.mean_loss).all()


@pytest.mark.filterwarnings("ignore")
def test_longer_training_plans_anew(tmp_path: Path) -> None:
    regime = Regime("longer", "resumed", data=ordered)
    run(regime, tmp_path, None, False)
    longer = Regime("longer", "resumed", data=ordered, trainer=lambda: {"max_epochs": 6})
    resumed, _ = run(longer, tmp_path, None, True)
    assert resumed is not None and resumed.run.steps == 24
    assert resumed.run.schedule["planned_steps"] == 24 and resumed.run.schedule["steps"] == 24


@pytest.mark.filterwarnings("ignore")
def test_a_failed_recording_stays_ended_and_keeps_what_it_had(tmp_path: Path) -> None:
    regime = Regime("failed", "resumed", data=ordered)
    with accident(FINE, "update", 8):
        run(regime, tmp_path, 13, False, on_error="warn")
        resumed, _ = run(regime, tmp_path, None, True, on_error="warn")
    assert resumed is not None and resumed.run.steps == 8 and resumed.observations.sum() == 8 * 5
    assert any("recording stopped after 8 steps" in note for note in resumed.run.notes)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_saved_although_our_state_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regime = Regime("broken", "resumed", data=ordered)
    _, left = run(regime, tmp_path / "whole", None, False)
    monkeypatch.setattr(FINE, "state_dict", lambda self: 1 / 0)
    run(regime, tmp_path / "parts", 13, False, on_error="warn")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="earlier steps are missing .there is no recording of them"):
        resumed, again = run(regime, tmp_path / "parts", None, True, on_error="warn")
    assert not differing(left, again) and resumed is not None and resumed.run.steps == 4


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_an_accident_holds_the_recording(tmp_path: Path) -> None:
    regime = Regime("accident", "resumed", data=lambda: vectors(remembering))
    keep = ModelCheckpoint(tmp_path / "parts", filename="last", save_on_exception=True, every_n_epochs=99)
    ended = Regime("accident", "resumed", data=regime.data, trainer=lambda: {"callbacks": [keep]})
    run(ended, tmp_path / "others", 10, False)
    resumed, _ = run(regime, tmp_path / "parts", None, True)
    assert resumed is not None and "resumed at step 10 from a checkpoint" in resumed.run.notes
    assert resumed.run.steps == 15  # the loader had handed out the batch of the accident


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_processes_go_on_together(tmp_path: Path) -> None:
    folder = trained()
    for rank in range(2):
        whole, resumed = (loaded(folder / name, rank) for name in ("whole", "resumed"))
        assert not unequal(whole[2], resumed[2]) and not differing(
            {"": [*whole[3].values()]}, {"": [*resumed[3].values()]}
        )
        assert resumed[2].run.steps == whole[2].run.steps > loaded(folder / "part", rank)[2].run.steps


@pytest.mark.filterwarnings("ignore")
def test_the_state_is_of_plain_types(tmp_path: Path) -> None:
    run(Regime("state", "resumed", data=ordered), tmp_path, None, False)
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert loaded["ine_callback"]["recorder"]["steps"] == 15


def test_the_state_grows_as_documented() -> None:
    """docs/howto/long-runs.md: 28 bytes a row and query, 92 a row; the null stays below 0.7 MB a query."""

    def size(rows: int, queries: int) -> int:
        infos = tuple(QueryInfo(str(k), "self" if k == 0 else "loss", "?") for k in range(queries))
        accumulators, file = RowAccumulators("Test", rows, infos, [FINE()], torch.device("cpu"), True, 4), io.BytesIO()
        torch.save(accumulators.state_dict(), file)
        return file.getbuffer().nbytes

    for queries in (1, 8):
        small, large = size(100_000, queries), size(200_000, queries)
        assert large - small == pytest.approx(100_000 * (28 * queries + 92), rel=0.01)
        assert small < 100_000 * (28 * queries + 92) + queries * 700_000
