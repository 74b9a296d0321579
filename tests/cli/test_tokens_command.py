"""``ine-callback tokens``: the mask of a saved report is that of Python; faults are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ine_callback import InfluenceReport, TokenMask
from ine_callback.cli import main
from ine_callback.report import example_report
from tests.helpers.attributions import of_tokens


@pytest.fixture
def saved(tmp_path: Path) -> str:
    example_report().with_attributions(of_tokens()).save(tmp_path / "report")
    return str(tmp_path / "report")


def test_the_mask_is_that_of_python(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "mask.parquet"
    assert main(["tokens", saved, "--quantile", ".9", "--window", "0", "--budget", ".08", "-o", str(file)]) == 0
    expected = InfluenceReport.load(saved).token_mask(quantile=0.9, window=0, budget=0.08)
    found = TokenMask.load(file)
    assert np.array_equal(found.rows, expected.rows) and np.array_equal(found.positions, expected.positions)
    out = capsys.readouterr().out
    assert f"{len(expected)} of 300 tokens ({expected.share:.2%})" in out and out.endswith("mask.parquet\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "BIF"], "'BIF' has scored tokens"),
        (["--query", "val"], "no query 'val'"),
        (["--budget", "0"], "budget=0.0"),
    ],
)
def test_faults_are_one_line(saved: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", saved, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
