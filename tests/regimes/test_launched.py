"""Strategies that start their own processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from ine_callback import InfluenceReport
from ine_callback.integrations.trainer import is_known
from tests.helpers.identical import differing

from .regime import EPOCHS
from .together import BROKEN, LAUNCHED, ROOT, TOGETHER, loaded, trained


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.regimes.launched", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.long
def test_ddp_leaves_one_report_and_every_process_has_it(tmp_path: Path) -> None:
    done = launched("ddp", str(tmp_path / "report"))
    assert not done.returncode, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("recorded")]
    assert len(told) == 2 and told[0] == told[1]  # both have both methods' scores
    report = InfluenceReport.load(tmp_path / "report")
    assert (report.observations == EPOCHS).all() and len(report.stages("BIF")) == 1


@pytest.mark.long
def test_tensor_parallelism_is_refused_with_a_remedy() -> None:
    done = launched("tensor_parallel")
    told = "tensor parallelism is not supported; use ModelParallelStrategy(tensor_parallel_size=1)"
    assert done.returncode and told in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, XLAStrategy])
def test_strategies_that_give_no_whole_gradients_are_unknown(kind: type) -> None:
    assert not is_known(object.__new__(kind))


@pytest.mark.parametrize("name", [name for _, name in BROKEN])
def test_a_breakdown_in_one_process_leaves_a_split_model_alone(name: str) -> None:
    """A pass of ours that only one process runs would mix its data with the training's."""
    folder = trained(LAUNCHED[0])
    for rank in range(2):
        plain = loaded(folder / f"{TOGETHER.index(LAUNCHED[0])}-plain", rank)
        broken = loaded(folder / name, rank)
        assert not differing(plain[0], broken[0])
        told = "the roof fell in" if rank else "process 1 of 2 stopped recording"
        assert any(told in note for note in broken[2].run.notes), broken[2].run.notes
