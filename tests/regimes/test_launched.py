"""Strategies that start their own processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ine_callback import InfluenceReport

from .regime import EPOCHS
from .together import ROOT


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.regimes.launched", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_ddp_leaves_one_report_and_every_process_has_it(tmp_path: Path) -> None:
    done = launched("ddp", str(tmp_path / "report"))
    assert not done.returncode, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("recorded")]
    assert len(told) == 2 and told[0] == told[1]  # both have both methods' scores
    report = InfluenceReport.load(tmp_path / "report")
    assert (report.observations == EPOCHS).all() and report.bif is not None


@pytest.mark.long
def test_a_strategy_that_splits_the_model_is_refused_with_a_remedy() -> None:
    done = launched("model_parallel")
    told = "under ModelParallelStrategy no process holds the whole model; train with strategy='ddp' or devices=1"
    assert done.returncode and told in done.stderr, done.stderr[-3000:]
