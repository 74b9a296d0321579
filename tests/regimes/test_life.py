"""Before, around and after a fit: further fits, other stages, accidents, a full disk. Training is never touched."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ine_callback import InfluenceCallback, InfluenceReport
from tests.helpers.identical import differing

from .harness import QUIET, fit
from .regime import EPOCHS, Classifier, Regime, vectors


def recorded(**options: Any) -> InfluenceCallback:
    return InfluenceCallback(["val", "self"], refresh_every=2, **options)


def test_two_fits_of_one_trainer_go_on_as_without_us() -> None:
    def twice(influence: InfluenceCallback | None) -> tuple[list[torch.Tensor], list[Any]]:
        L.seed_everything(1, verbose=False)
        data, module, reports = vectors(), Classifier(), []
        trainer = L.Trainer(**QUIET, callbacks=[influence] if influence else [])
        for epochs in (EPOCHS, 2 * EPOCHS):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, data.train, data.val)
            reports.append(influence.report if influence else None)
        return [*(p.detach().clone() for p in module.parameters()), torch.get_rng_state()], reports

    influence = recorded(on_error="raise")
    plain, (left, reports) = twice(None)[0], twice(influence)
    assert all(torch.equal(a, b) for a, b in zip(plain, left, strict=True))
    first, second = reports
    assert first is not second and (first.observations == EPOCHS).all() and (second.observations == EPOCHS).all()
    assert any("of a resumed run" in note for note in second.run.notes), second.run.notes


def test_validation_and_test_around_the_fit_see_nothing_of_us() -> None:
    L.seed_everything(1, verbose=False)
    data, module, influence = vectors(), Classifier(), recorded(on_error="raise")
    module.test_step = module.validation_step
    trainer = L.Trainer(**QUIET, callbacks=[influence])
    before = trainer.validate(module, data.val, verbose=False)
    assert influence.report is None
    trainer.fit(module, data.train, data.val)
    report = influence.report
    after = [run(module, data.val, verbose=False)[0]["val"] for run in (trainer.validate, trainer.test)]
    assert influence.report is report and report is not None and (report.observations == EPOCHS).all()
    assert before[0]["val"] != after[0] == after[1]


class Uncopied:
    """Part of a batch that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise OSError("the roof fell in")


class Hooked(Classifier):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def uncopied(items: list[Any]) -> list[Any]:
    return [*torch.utils.data.default_collate(items), Uncopied()]


def test_a_batch_that_cannot_be_copied_is_trained_on_as_without_us() -> None:
    regime = Regime("uncopied", "life", Hooked, lambda: vectors(collate=uncopied))
    influence = recorded(on_error="raise")
    with pytest.warns(UserWarning, match=r"whether Hooked.* mixes rows was not checked \(OSError: the roof fell in"):
        broken = fit(regime, influence)
    assert not differing(fit(regime, None).left, broken.left)
    assert influence.report is not None and (influence.report.observations == EPOCHS).all()


class Full(L.Callback):
    """No file may grow over some bytes while the report is saved: what a full disk looks like."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_end(self, *_: Any) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if self.limit is None else self.limit, hard))


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_full_disk_loses_the_files_but_not_the_report(limit: int, tmp_path: Path) -> None:
    influence = recorded(dirpath=tmp_path / "report")
    data, module = vectors(), Classifier()
    trainer = L.Trainer(**QUIET, callbacks=[Full(limit), influence, Full(None)])
    with pytest.warns(UserWarning, match=r"InfluenceCallback: .*could not be saved.*File too large"):
        trainer.fit(module, data.train, data.val)
    assert influence.report is not None and (influence.report.observations == EPOCHS).all()
    assert influence.report.save(tmp_path / "elsewhere").exists()  # the remedy


class Interrupt(L.Callback):
    """Ctrl-C in the seventh step: the signal that a terminal sends."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def _heard() -> Iterator[None]:
    """A process in a shell's background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
def test_ctrl_c_leaves_the_report_of_the_steps_before(tmp_path: Path) -> None:
    influence, data = recorded(dirpath=tmp_path / "report", on_error="raise"), vectors()
    with pytest.raises(SystemExit):  # what Lightning makes of it
        L.Trainer(**QUIET, callbacks=[influence, Interrupt()]).fit(Classifier(), data.train, data.val)
    report = InfluenceReport.load(tmp_path / "report")
    assert report.run.steps == 7 and any("ended by KeyboardInterrupt" in note for note in report.run.notes)


def test_a_report_that_could_not_be_saved_leaves_an_older_one_whole(tmp_path: Path) -> None:
    fit(Regime("first", "life"), recorded(dirpath=tmp_path / "report", on_error="raise"))
    before = InfluenceReport.load(tmp_path / "report")
    trainer = L.Trainer(**QUIET, callbacks=[Full(100), recorded(dirpath=tmp_path / "report"), Full(None)])
    data = vectors()
    with pytest.warns(UserWarning, match="could not be saved"):
        trainer.fit(Classifier(), data.train, data.val)
    assert InfluenceReport.load(tmp_path / "report").run.started == before.run.started
