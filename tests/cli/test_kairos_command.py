"""``ine-callback kairos``: values of rows in files are those of Python, in any form of file; faults are one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from ine_callback.cli import main
from ine_callback.methods.kairos.values import kairos
from tests.helpers.row_files import WRONG, row_arrays, save_row_files


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path) -> None:
    save_row_files(tmp_path)


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_values_are_those_of_python(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kairos", f"train.{kind}", f"reference.{kind}", "--top", "3", "--json", "-o", "new/v.parquet"]) == 0
    arrays = row_arrays()
    expected = kairos(*arrays["train"], *arrays["reference"])
    table = parquet.read_table("new/v.parquet")
    assert table.column_names == ["row", "value", "features", "conformal_p", "labels"]
    assert np.abs(table["value"].to_numpy() - expected.values).max() < 1e-12
    found = json.loads(capsys.readouterr().out)
    assert [each["row"] for each in found["most harmful"]] == expected.values.argsort()[:3].tolist()
    assert table["labels"].to_numpy().argmin() == WRONG
    assert found["settings"]["sigma_used"] == expected.sigma


def test_options_are_those_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    line = "kairos train.npz reference.npz --sigma 3 --lam .5 --first-order --random-features 64 --seed 4 -o v.csv"
    assert main(shlex.split(line)) == 0
    arrays = row_arrays()
    expected = kairos(*arrays["train"], *arrays["reference"], sigma=3.0, lam=0.5, loo=False, random_features=64, seed=4)
    assert np.abs(csv.read_csv("v.csv")["value"].to_numpy() - expected.values).max() < 1e-12
    out = capsys.readouterr().out
    assert "first order · σ 3" in out and out.endswith("v.csv\n") and "most helpful" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere.npz reference.npz", "nowhere.npz"),
        ("train.txt reference.npz", "no .npz, .parquet or .csv"),
        ("damaged.npz reference.npz", "not a readable .npz"),
        ("damaged.parquet reference.npz", "not a readable .parquet"),
        ("objects.npz reference.npz", "plain arrays"),
        ("other.npz reference.npz", "arrays ['z'], and features must be called 'x'"),
        ("train.csv reference.csv --label a", "no numbers: y (string)"),
        ("gaps.csv reference.csv", "training row 1 has features that are NaN"),
        ("train.npz train.npz", "are in the reference too"),
        ("train.npz unlabelled.npz", "reference rows have no labels"),
        ("train.npz reference.npz --sigma 0", "sigma=0.0"),
        ("train.npz reference.npz --top 0", "--top is 0"),
        ("train.npz reference.npz -o values.txt", "neither .csv nor .parquet"),
    ],
)
def test_faults_are_one_line_and_status_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.txt").write_text("x")
    for name in ("damaged.npz", "damaged.parquet"):
        Path(name).write_bytes(b"nonsense")
    np.savez("objects.npz", x=np.array([{}], dtype=object))
    np.savez("other.npz", z=np.ones(3))
    np.savez("unlabelled.npz", x=row_arrays()["reference"][0])
    csv.write_csv(pa.table({"a": [1.0, None], "b": [1.0, 2.0], "c": [0.0, 1.0], "y": ["no", "yes"]}), "gaps.csv")
    assert main(["kairos", *shlex.split(line)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("ine-callback: ") and err.count("\n") == 1
