"""Unknown rows and queries, and folders that hold no report or a damaged one, are refused with the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ine_callback import InfluenceReport
from ine_callback.report import example_report


def test_an_unknown_row_in_a_group_is_named() -> None:
    report = example_report()
    with pytest.raises(KeyError, match=r"InfluenceReport\.group: no row 60, -1; the report has rows 0 to 59"):
        report.group([3, 60, -1])
    with pytest.raises(ValueError, match=r"InfluenceReport\.group: row 59 never observed.*report\.unseen"):
        report.group([59])
    with pytest.raises(KeyError, match=r"InfluenceReport: no query 'vall'; choose one of .*'val'"):
        report.group([3], query="vall")


def _edit(folder: Path, **values: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | values), encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "missing"),
    "no scores": (lambda f: (f / "scores.parquet").unlink(), "scores.parquet missing"),
    "truncated scores": (lambda f: (f / "scores.parquet").write_bytes(b"PAR1"), "scores.parquet"),
    "not JSON": (lambda f: (f / "meta.json").write_text("{"), "not JSON"),
    "foreign": (lambda f: (f / "meta.json").write_text('{"format": "of another program"}'), "does not belong"),
    "newer": (lambda f: _edit(f, format_version=99), "99.*upgrade"),
    "wrong rows": (lambda f: _edit(f, rows=61), "180 lines, expected 183"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused(case: str, tmp_path: Path) -> None:
    damage, told = DAMAGES[case]
    folder = example_report().save(tmp_path / "report")
    damage(folder)
    with pytest.raises(ValueError, match=rf"(?s)InfluenceReport\.load: .*report.*{told}") as caught:
        InfluenceReport.load(folder)
    assert ";" in str(caught.value)  # then comes the remedy


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"InfluenceReport\.load: .*nowhere: no such folder; give the folder"):
        InfluenceReport.load(tmp_path / "nowhere")
