"""The disk format: exact round trip, atomic saves, and a clear error for whatever is not a report."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ine_callback.methods.bif.scores import example_bif_scores
from ine_callback.report import InfluenceReport, ReportError, RunInfo, example_report
from ine_callback.scores import WINDOWS, QueryInfo, Scores


def assert_same(one: InfluenceReport, other: InfluenceReport) -> None:
    assert one.run == other.run and one.scores.queries == other.scores.queries
    for each in fields(Scores):
        if each.name != "queries":
            a, b = getattr(one.scores, each.name), getattr(other.scores, each.name)
            if a is None or b is None:  # margins, where the run knew none
                assert a is b, each.name
                continue
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=each.name)
            if a.dtype == np.float64:  # -0.0 and the like
                np.testing.assert_array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)]))


@st.composite
def reports(draw: st.DrawFn) -> InfluenceReport:
    n, q, m = draw(st.integers(0, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 5))
    floats = st.floats(allow_nan=True, width=64)
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=q, max_size=q, unique=True))
    kinds = st.sampled_from(["loss", "margin", "self", "custom"])
    queries = tuple(QueryInfo(name, draw(kinds), "why " + name) for name in names)
    seen = draw(arrays(np.int64, n, elements=st.integers(0, 2**31)))
    matrices = {
        name: np.where(seen[:, None] > 0, draw(arrays(np.float64, (n, q), elements=floats)), np.nan)
        for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd")
    }
    matrices |= {name: np.abs(matrices[name]) for name in ("se", "null_sd")}
    scores = Scores(
        queries=queries,
        observations=seen,
        mean_loss=draw(arrays(np.float64, n, elements=floats)),
        null_mu=draw(arrays(np.float64, (q, m), elements=floats)),
        null_ks_p=draw(arrays(np.float64, q, elements=st.floats(0, 1) | st.just(np.nan))),
        margins=draw(st.none() | arrays(np.float64, (n, WINDOWS), elements=floats)),
        unit=draw(st.none() | arrays(np.float64, q, elements=st.floats(0, exclude_min=True) | st.just(np.nan))),
        query_loss=draw(st.none() | arrays(np.float64, q, elements=floats)),
        **matrices,
    )
    notes = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=2))
    return InfluenceReport(scores, RunInfo(notes=notes, seconds=draw(st.floats(0, 1e9)), rows=n))


@settings(max_examples=40, deadline=None)
@given(reports())
def test_round_trip_is_exact(report: InfluenceReport) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_same(report, InfluenceReport.load(report.save(Path(folder) / "a" / "b")))


def test_unseen_rows_are_null_on_disk(tmp_path: Path) -> None:
    report = example_report()
    report.save(tmp_path)
    table = pq.ParquetFile(tmp_path / "scores.parquet").read()
    last = table.filter(pa.compute.equal(table["row"], 59))
    assert last["mu"].to_pylist() == [None] * 3 and last["observations"].to_pylist() == [0] * 3
    assert table.num_rows == 180 and sorted(os.listdir(tmp_path)) == ["meta.json", "null.parquet", "scores.parquet"]


def test_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    report = example_report()
    report.save(tmp_path)
    path = tmp_path / "scores.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table.take(np.random.default_rng(0).permutation(180)), path)
    assert_same(report, InfluenceReport.load(tmp_path))


def test_saving_again_replaces_the_report_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    example_report(40).save(tmp_path)
    example_report(50).save(tmp_path)
    assert InfluenceReport.load(tmp_path).rows == 50
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "mine.txt", "null.parquet", "scores.parquet"]


@pytest.mark.parametrize("survive", range(3))
def test_an_interrupted_replace_leaves_the_new_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survive: int
) -> None:
    """The disk fails after ``survive`` of the three files: the others are read from where they wait."""
    example_report(40).with_attributions(example_bif_scores()).save(tmp_path)
    replace, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > survive:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        example_report(50).save(tmp_path)
    monkeypatch.undo()
    found = InfluenceReport.load(tmp_path)
    assert_same(found, example_report(50))
    assert found.attributions == ()
    example_report(60).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "null.parquet", "scores.parquet"]
    assert InfluenceReport.load(tmp_path).rows == 60


def test_a_failure_while_writing_leaves_the_former_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = example_report(40)
    former.save(tmp_path)

    def failing(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        example_report(50).save(tmp_path)
    assert_same(former, InfluenceReport.load(tmp_path))


def _edit_meta(folder: Path, **changes: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_scores(folder: Path, name: str, values: Any, kind: Any = None) -> None:
    path = folder / "scores.parquet"
    table = pq.ParquetFile(path).read()
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, pa.array(values, kind or table.schema.field(name).type)), path)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(bytes(data))


def _link_pickle(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.parent / "exploded"),)

    path.write_bytes(pickle.dumps(Bomb()))


ROWS = np.tile(np.arange(60), 3)
FAULTS: dict[str, tuple[Any, str]] = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "meta.json missing"),
    "no null": (lambda f: (f / "null.parquet").unlink(), "null.parquet missing"),
    "garbage meta": (lambda f: (f / "meta.json").write_text("{oops"), "not JSON"),
    "binary meta": (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "deep meta": (lambda f: (f / "meta.json").write_text("[" * 100_000), "not JSON"),
    "list meta": (lambda f: (f / "meta.json").write_text("[]"), "does not belong to a report"),
    "foreign meta": (lambda f: (f / "meta.json").write_text('{"a": 1}'), "does not belong to a report"),
    "version": (lambda f: _edit_meta(f, format_version=99), "format version is 99.*upgrade"),
    "rows": (lambda f: _edit_meta(f, rows=61), "180 lines, expected 183"),
    "negative rows": (lambda f: _edit_meta(f, rows=-1), "rows is -1"),
    "many rows": (lambda f: _edit_meta(f, rows=10**12), "180 lines"),
    "queries": (lambda f: _edit_meta(f, queries=[{"name": "a"}]), "a query is not made of"),
    "queries of no type": (lambda f: _edit_meta(f, queries={}), "not a list of queries"),
    "no queries": (lambda f: _edit_meta(f, queries=[]), "null_ks_p is not a list of 0 numbers"),
    "no queries and no checks": (lambda f: _edit_meta(f, queries=[], null_ks_p=[]), "180 lines, expected 60"),
    "kind": (lambda f: _edit_meta(f, queries=[{"name": "a", "kind": "b", "question": ""}]), "query kind 'b'"),
    "renamed": (
        lambda f: _edit_meta(f, queries=[{"name": n, "kind": "loss", "question": ""} for n in "abc"]),
        "queries that meta.json does not name",
    ),
    "checks": (lambda f: _edit_meta(f, null_ks_p=[1]), "null_ks_p is not a list of 3"),
    "check": (lambda f: _edit_meta(f, null_ks_p=["x", 1, 1]), "not a number"),
    "run": (lambda f: _edit_meta(f, run=[]), "run is not an object"),
    "run field": (lambda f: _edit_meta(f, run={"steps": "many"}), "steps must be int"),
    "new run field": (lambda f: _edit_meta(f, run={"new": 1}), "unknown fields"),
    "empty scores": (lambda f: (f / "scores.parquet").write_bytes(b""), "not a readable Parquet file"),
    "truncated": (lambda f: os.truncate(f / "scores.parquet", 3000), "not a readable Parquet file"),
    "flipped bit": (lambda f: _flip(f / "scores.parquet"), "damaged|not a readable Parquet file"),
    "pickle": (lambda f: _link_pickle(f / "scores.parquet"), "not a readable Parquet file"),
    "other schema": (lambda f: pq.write_table(pa.table({"a": [1]}), f / "scores.parquet"), "has columns a: int64"),
    "null schema": (lambda f: pq.write_table(pa.table({"a": [1]}), f / "null.parquet"), "null.parquet has columns"),
    "swapped": (lambda f: os.replace(f / "null.parquet", f / "scores.parquet"), "null.parquet missing"),
    "dtype": (lambda f: _edit_scores(f, "mu", ["x"] * 180, pa.string()), "mu: string"),
    "row range": (lambda f: _edit_scores(f, "row", ROWS + 1), "row ids outside 0 to 59"),
    "negative row": (lambda f: _edit_scores(f, "row", ROWS - 1), "row ids outside"),
    "repeated row": (lambda f: _edit_scores(f, "row", np.maximum(ROWS, 1)), "more than once"),
    "null row": (lambda f: _edit_scores(f, "row", [None] * 180), "row has nulls"),
    "loss differs": (lambda f: _edit_scores(f, "mean_loss", np.arange(180.0)), "mean_loss of a row differs"),
    "score of unseen": (lambda f: _edit_scores(f, "mu", np.zeros(180)), "never observed rows have scores"),
    "negative count": (lambda f: _edit_scores(f, "observations", np.full(180, -1)), "count >= 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_not_a_report_is_named(tmp_path: Path, fault: str) -> None:
    example_report().save(tmp_path)
    damage, message = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(ReportError, match=message) as caught:
        InfluenceReport.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "; " in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_missing_folder_and_plain_file(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no such folder"):
        InfluenceReport.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match="no such folder"):
        InfluenceReport.load(tmp_path / "file")
    with pytest.raises(ReportError, match=r"meta\.json, scores\.parquet, null\.parquet missing"):
        InfluenceReport.load(tmp_path)


def test_a_folder_named_like_a_partition_is_no_partition(tmp_path: Path) -> None:
    report = example_report()
    assert_same(report, InfluenceReport.load(report.save(tmp_path / "row=3")))


@pytest.mark.long
def test_a_hundred_thousand_rows_are_saved_in_seconds(tmp_path: Path) -> None:
    report = example_report(100_000)
    start = time.perf_counter()
    report.save(tmp_path)
    assert time.perf_counter() - start < 10.0  # about one second; a loop over rows takes minutes
