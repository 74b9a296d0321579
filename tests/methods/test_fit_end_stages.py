"""Methods at several stages of a fit: checkpoints keep what was found, and Ctrl-C ends a method or the fit."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ine_callback import BIF, FINE, CallableQuery, InfluenceCallback, InfluenceReport
from ine_callback.integrations.callback import KEY
from ine_callback.methods import FitContext, FitEndMethods, PerSamplePass
from ine_callback.methods.fit_end import Interrupted
from ine_callback.queries.sources import DataSource
from ine_callback.scores import Attribution
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import QUIET, SHORT_CHAINS, Model, loaders
from tests.helpers.fit_end import INFO, Dots, Norms, Plain, assert_untouched, by_method, fit


def test_stages_that_never_came_are_told(alone: tuple[Model, Any]) -> None:
    model, influence, _ = fit([FINE(), Norms([1, 7, 9, "end"])], raises=True)
    assert_untouched(model, alone)
    assert [each.at for each in influence.report.attributions] == [1, "end"]
    (note,) = [note for note in influence.report.run.notes if "gradient norm" in note]
    assert note == "gradient norm: training ended before epochs [7, 9] of at=[1, 7, 9, 'end']"


def test_a_resumed_fit_has_the_stages_before(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [FINE(), Norms([1, 2, "end"]), Dots(), BIF(**SHORT_CHAINS, at=[1, "end"])]  # type: ignore[arg-type]

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _, whole, _ = fit(methods(), raises=True, epochs=2, callbacks=[saving], enable_checkpointing=True)
    path = next(tmp_path.glob("epoch=0*"))
    state = torch.load(path, weights_only=True)[KEY]["fit_end"]  # what Lightning may load it with
    assert [each["method"] for each in state["found"]] == ["BIF", "gradient norm", "gradient dot"]
    _, resumed, _ = fit(methods(), raises=True, epochs=2, ckpt_path=path)
    found, expected = by_method(resumed.report), by_method(whole.report)
    assert set(found) == set(expected) and len(found) == 7
    for key in [key for key in expected if key[1] == 1]:
        assert_same(found[key], expected[key])
    assert not [note for note in resumed.report.run.notes if "ended before" in note]


def test_scores_of_a_damaged_checkpoint_cost_not_the_recording(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit([FINE(), Dots()], raises=True, epochs=1, callbacks=[saving], enable_checkpointing=True)
    path = next(tmp_path.glob("epoch=0*"))
    saved = torch.load(path, weights_only=True)
    del saved[KEY]["fit_end"]["found"][0]["scores"]
    torch.save(saved, path)
    with pytest.warns(UserWarning, match="scores of earlier stages are lost: TypeError"):
        _, influence, _ = fit([FINE(), Dots()], ckpt_path=path)
    report = influence.report
    assert [each.at for each in report.attributions] == ["end"] and report.run.steps == 12


class Stopped(Norms):
    """Ctrl-C comes while it runs; what it has is kept, or not."""

    name = "stopped"

    def __init__(self, at: Any, keeps: bool) -> None:
        super().__init__([at])
        self.keeps = keeps

    def run(self, context: FitContext) -> Any:
        def take(rows: Tensor, gradients: Any) -> None:
            if 64 in rows:
                found = Attribution("x", np.arange(64), context.infos, np.ones((64, 1)), notes=("64 of 96 rows",))
                raise Interrupted(found) if self.keeps else KeyboardInterrupt

        yield PerSamplePass(), take


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.filterwarnings("ignore:.*was ended by Ctrl-C")
def test_ctrl_c_in_the_middle_ends_the_fit_and_leaves_a_report(keeps: bool, tmp_path: Path) -> None:
    other = type("Other", (Norms,), {"name": "other"})([1, "end"])
    ready = loaders()
    torch.manual_seed(1)
    influence = InfluenceCallback("val", [FINE(), Stopped(1, keeps), other, Plain()], dirpath=tmp_path)
    trainer = L.Trainer(max_epochs=3, callbacks=[influence], logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(SystemExit):
        trainer.fit(Model(), *ready)
    report = InfluenceReport.load(tmp_path)
    assert report.run.steps == 6 and set(by_method(report)) == ({("stopped", 1)} if keeps else set())
    told = [note for note in report.run.notes if "Ctrl-C" in note]
    assert [note.split()[0] for note in told] == (["other"] if keeps else ["stopped", "other"])
    if keeps:
        assert (
            report.attribution("stopped").notes == ("64 of 96 rows",) and len(report.attribution("stopped").rows) == 64
        )


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.filterwarnings("ignore:.*was ended by Ctrl-C")
def test_ctrl_c_at_the_end_ends_one_method(keeps: bool, alone: tuple[Model, Any], tmp_path: Path) -> None:
    model, _, _ = fit([FINE(), Stopped("end", keeps), Dots(), Plain()], dirpath=tmp_path)
    assert_untouched(model, alone)
    report = InfluenceReport.load(tmp_path)
    others = {("gradient dot", 1), ("gradient dot", "end"), ("plain", "end")}
    assert set(by_method(report)) == others | ({("stopped", "end")} if keeps else set())
    assert [note for note in report.run.notes if "Ctrl-C" in note] == (
        [] if keeps else ["stopped was ended by Ctrl-C."]
    )


def test_a_stage_that_is_reached_again_replaces_what_was_found() -> None:
    """As when training is resumed from before a stage that it had reached."""
    methods = FitEndMethods([Plain()], "Test", "raise")
    for title in ("old", "new"):
        loader = loaders()[0]
        source = DataSource("Test", lambda module, batch: module.training_step(batch, 0), loader, [loader], 10**6)
        query = CallableQuery(source.loss, next(iter(loader))).bind("q", source)
        methods.run(FitContext(Model(), query, source, source.loss, owner="Test"))
        methods.found = [replace(each, title=each.title or title) for each in methods.found]
    assert [each.title for each in methods.found] == ["new"]


def test_the_state_is_plain() -> None:
    """It loads where nothing but tensors and plain types may be loaded, and is a copy."""
    methods = FitEndMethods([], "Test")
    methods.found = [Attribution("x", np.arange(2), (INFO,), np.ones((2, 1)), columns={"c": np.zeros((2, 1))})]
    methods.notes, methods._reached = ["a note"], {1, "end"}
    torch.save(methods.state_dict(), file := io.BytesIO())
    file.seek(0)
    again = FitEndMethods([], "Test")
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same(again.found, methods.found)
    assert again.notes == ["a note"] and again._reached == {1, "end"}
