"""A report's numbers in other programs: the same values, no row lost, no score invented for rows never observed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from ine_callback.report import InfluenceReport, RowScore, example_report
from ine_callback.scores import QueryInfo

NUMBERS = [name for name in RowScore._fields if name not in ("row", "query")]
ESCAPES = 'a\x1b[31m\x07\n"b",c'


@pytest.fixture
def report() -> InfluenceReport:
    return example_report()


def named(report: InfluenceReport, name: str) -> InfluenceReport:
    """The report with another name for its first query."""
    first, *others = report.scores.queries
    queries = (QueryInfo(name, first.kind, first.question), *others)
    return InfluenceReport(replace(report.scores, queries=queries), report.run)


def same(frame: pandas.DataFrame, report: InfluenceReport) -> None:
    expected = report.to_pandas()
    assert list(frame.columns) == list(RowScore._fields)
    assert frame["row"].tolist() == expected["row"].tolist()
    assert frame["query"].tolist() == expected["query"].tolist()
    for name in NUMBERS:
        np.testing.assert_array_equal(frame[name].to_numpy(float), expected[name].to_numpy(float), name)


def test_keep_list_and_drop_list_part_the_rows(report: InfluenceReport) -> None:
    for query, q in ((None, 0.05), ("val", 0.05), ("self", 0.5)):
        keep, drop = report.keep_list(q, query), report.drop_list(q, query)
        assert sorted([*keep, *drop]) == list(range(60)) and keep.tolist() == sorted(keep)
    assert example_report(planted=(29, 3, 17)).drop_list().tolist() == [29, 3, 17]  # worst first
    assert 59 in report.keep_list() and report.unseen.tolist() == [59]
    with pytest.raises(ValueError, match=r"keep_list: q is 2"):
        report.keep_list(2)


def test_arrow_has_null_where_there_is_no_score(report: InfluenceReport) -> None:
    table = report.to_arrow()
    same(table.to_pandas(), report)
    assert pa.types.is_dictionary(table.schema.field("query").type)
    assert table["mu"].null_count == 3 and table["observations"].null_count == 0
    assert not any(np.isnan(table[name].drop_null().to_numpy()).any() for name in NUMBERS)


def test_polars_has_the_same_numbers(report: InfluenceReport) -> None:
    pytest.importorskip("polars")
    frame = report.to_polars()
    assert frame["mu"].null_count() == 3
    same(frame.to_arrow().to_pandas(), report)


def test_a_dataset_column_is_aligned_to_the_rows(report: InfluenceReport) -> None:
    for query, name in (("val", "mu"), ("self", "q"), (None, "mean_loss"), ("self", "observations")):
        frame = report.to_pandas()
        expected = frame[frame["query"] == (query or "self")][name]
        column = report.to_dataset_column(query, name)
        np.testing.assert_array_equal(column.to_numpy(zero_copy_only=False), expected.to_numpy())
    with pytest.raises(ValueError, match="no column 'row'; choose one of mu, se"):
        report.to_dataset_column(name="row")


def test_hugging_face_datasets_take_the_column(report: InfluenceReport) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [str(row) for row in range(60)]})
    data = data.add_column("influence", report.to_dataset_column("val"))
    assert data[59] == {"text": "59", "influence": None}
    assert data[3]["influence"] == report.scores.mu[3, 1]
    assert len(data.filter(lambda one: one["influence"] is not None)) == 59


@pytest.mark.parametrize("query", [None, "val"])
def test_files_hold_what_pandas_holds(report: InfluenceReport, query: str | None, tmp_path: Path) -> None:
    readers = {
        "csv": lambda path: csv.read_csv(path).to_pandas(),
        "json": lambda path: pandas.DataFrame(json.loads(path.read_text())),
        "parquet": lambda path: pq.read_table(path).to_pandas(),
    }
    for form, read in readers.items():
        frame = read(report.export(tmp_path / "new" / form, form, query))
        if query is None:
            same(frame, report)
        else:
            expected = report.to_pandas()
            expected = expected[expected["query"] == query]
            assert frame["query"].tolist() == ["val"] * 60
            np.testing.assert_array_equal(frame["mu"].to_numpy(float), expected["mu"].to_numpy())
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == sorted(readers)


def test_lists_of_rows_are_csv_or_json(report: InfluenceReport, tmp_path: Path) -> None:
    drop = report.export(tmp_path / "drop.csv", "drop-list")
    assert drop.read_text() == "row\n3\n17\n29\n"
    keep = report.export(tmp_path / "keep.json", "keep-list", "val margin", 0.05)
    assert json.loads(keep.read_text()) == report.keep_list(0.05, "val margin").tolist()
    assert report.export(tmp_path / "none.csv", "drop-list", q=0.0).read_text() == "row\n"


def test_csv_and_json_carry_no_control_characters(report: InfluenceReport, tmp_path: Path) -> None:
    odd = named(report, ESCAPES)
    lines, text = odd.export(tmp_path / "a.csv"), odd.export(tmp_path / "a.json", "json")
    for path in (lines, text):
        assert not set(path.read_bytes()) & (set(range(32)) - {10} | {127})
    assert csv.read_csv(lines).to_pandas()["query"][0] == 'a·[31m··"b",c'
    assert json.loads(text.read_text())[0]["query"] == ESCAPES  # JSON can hold it, escaped


def test_json_holds_infinity_as_text(report: InfluenceReport, tmp_path: Path) -> None:
    t = report.scores.t.copy()
    t[0, 0] = -np.inf
    endless = InfluenceReport(replace(report.scores, t=t))
    lines = json.loads(endless.export(tmp_path / "a.json", "json").read_text())
    assert lines[0]["t"] == "-inf" and lines[59]["t"] is None


def test_a_link_is_followed_and_a_file_replaced(report: InfluenceReport, tmp_path: Path) -> None:
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    for _ in range(2):
        report.export(link, "drop-list")
        assert link.is_symlink() and target.read_text().startswith("row\n3\n")
    with pytest.raises(IsADirectoryError):
        report.export(tmp_path, "drop-list")


def test_a_wrong_format_is_named(report: InfluenceReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no format 'xlsx'; choose one of csv, json"):
        report.export(tmp_path / "a.xlsx", "xlsx")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
