"""The Hydra app runs, and one word on the command line turns the callback off without touching the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ine_callback import InfluenceReport

pytest.importorskip("hydra", reason="hydra-core is not installed")

ONE_EPOCH = ("trainer.max_epochs=1",)
Run = Callable[..., str]


def accuracies(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("Validation accuracy")]


def test_the_callback_is_switched_on_the_command_line(program: Run, tmp_path: Path) -> None:
    sweep = ("--multirun", "hydra.sweep.dir=runs", "influence.enabled=true,false")  # one program, to import torch once
    printed = program("hydra_train.py", *sweep, *ONE_EPOCH, "influence.methods.0.null_draws=4")
    report = InfluenceReport.load(tmp_path / "runs" / "0" / "influence")
    assert report.queries == ("margin", "self") and report.rows == 1437 and (report.observations == 1).all()
    assert not (tmp_path / "runs" / "1" / "influence").exists()

    recorded, plain = printed.split("Written to")
    assert f"{report.top(1, 'self')[0].row}" in recorded and "Not recorded" not in recorded
    assert "Not recorded." in plain
    assert accuracies(plain) == accuracies(recorded) and len(accuracies(plain)) == 1  # to the last digit


def test_a_run_of_each_seed_can_be_combined(program: Run, tmp_path: Path) -> None:
    program(
        "hydra_train.py", "--multirun", "hydra.sweep.dir=seeds", "seed=1,2", *ONE_EPOCH, "influence.queries=[self,val]"
    )
    reports = [InfluenceReport.load(tmp_path / "seeds" / job / "influence") for job in ("0", "1")]
    assert reports[0].queries == ("val", "self")
    assert InfluenceReport.combine(reports).rows == 1437
