"""The Hydra app runs, and one word on the command line turns the callback off without touching the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ine_callback import InfluenceReport

pytest.importorskip("hydra", reason="hydra-core is not installed")

Run = Callable[..., str]


@pytest.mark.long
def test_one_word_switches_the_callback_and_the_runs_of_a_sweep_can_be_combined(program: Run, tmp_path: Path) -> None:
    """Four jobs in one program, to import torch once: both seeds, each with the callback and without."""
    sweep = ("--multirun", "hydra.sweep.dir=runs", "seed=1,2", "influence.enabled=true,false")
    printed = program("hydra_train.py", *sweep, "trainer.max_epochs=1", "influence.methods.0.null_draws=4")
    reports = [InfluenceReport.load(tmp_path / "runs" / job / "influence") for job in ("0", "2")]
    assert reports[0].queries == ("margin", "self") and (reports[0].observations == 1).all()
    assert InfluenceReport.combine(reports).rows == 1437
    assert not any((tmp_path / "runs" / job / "influence").exists() for job in ("1", "3"))

    first, *_ = printed.split("Written to")
    assert f"{reports[0].top(1, 'self')[0].row}" in first and "Not recorded" not in first
    assert printed.count("Not recorded.") == 2
    one, plain, other, other_plain = [x for x in printed.splitlines() if x.startswith("Validation accuracy")]
    assert one == plain and other == other_plain != one  # to the last digit
