"""The Hydra app runs, and one word on the command line turns the callback off without touching the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ine_callback import InfluenceReport

pytest.importorskip("hydra", reason="hydra-core is not installed")

FEW = ("trainer.max_epochs=1",)
Run = Callable[..., str]


def accuracy(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("Validation accuracy"))


def test_the_callback_is_switched_on_the_command_line(program: Run, tmp_path: Path) -> None:
    printed = program("hydra_train.py", "hydra.run.dir=on", *FEW, "influence.methods.0.null_draws=4")
    report = InfluenceReport.load(tmp_path / "on" / "influence")
    assert report.queries == ("margin", "self") and report.rows == 1437 and (report.observations == 1).all()
    assert f"{report.top(1, 'self')[0].row}" in printed and "Not recorded" not in printed

    plain = program("hydra_train.py", "hydra.run.dir=off", *FEW, "influence.enabled=false")
    assert "Not recorded." in plain and not (tmp_path / "off" / "influence").exists()
    assert accuracy(plain) == accuracy(printed)  # to the last digit


def test_a_run_of_each_seed_can_be_combined(program: Run, tmp_path: Path) -> None:
    program("hydra_train.py", "--multirun", "hydra.sweep.dir=seeds", "seed=1,2", *FEW, "influence.queries=[self,val]")
    reports = [InfluenceReport.load(tmp_path / "seeds" / job / "influence") for job in ("0", "1")]
    assert reports[0].queries == ("val", "self")
    assert InfluenceReport.combine(reports).rows == 1437
