"""Reports from strangers: a clean error or a whole report, whatever the folder holds; and saves that are killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ine_callback
from ine_callback.report import InfluenceReport, ReportError, attribution_store, example_report, legacy, store
from ine_callback.report.attribution_store import FIELDS
from tests.helpers.report import saver
from tests.helpers.report.damage import bomb_bytes, save_chains, save_former, save_plain
from tests.helpers.report.fuzz import CLEAN, run, table

ROOT = Path(next(iter(ine_callback.__path__))).parent


def faults(folders: range) -> list[str]:
    outcomes = list(run(folders))
    print(table(outcomes))
    assert {each.verdict for each in outcomes} >= set(CLEAN)  # the damage is neither always fatal nor never
    return [
        f"{each.number} {each.kind}: {each.verdict}: {each.detail}" for each in outcomes if each.verdict not in CLEAN
    ]


@pytest.mark.long
def test_two_hundred_damaged_folders_are_an_error_or_a_report() -> None:
    assert not faults(range(200))


@pytest.mark.long
def test_ten_thousand_damaged_folders_are_an_error_or_a_report() -> None:
    assert not faults(range(10_000))


def test_the_judge_sees_what_it_is_there_to_see(tmp_path: Path) -> None:
    """In a process of its own, for audit hooks stay."""
    code = """
import os, socket, subprocess, sys
from pathlib import Path
from ine_callback.report import InfluenceReport, ReportError, example_report
from tests.helpers.report.fuzz import Watch, judge
folder = example_report(12).save(Path(sys.argv[1]) / "report")
(folder.parent / "outside").touch()
watch, load = Watch(), InfluenceReport.load
def fail(error):
    raise error
loads = {
    "loaded": load,
    "error": lambda f: fail(ReportError(f, "fault")),
    "unclear message": lambda f: fail(ReportError(f / "x", "fault")),
    "wrong exception": lambda f: fail(KeyError("x")),
    "does not survive": lambda f: 1,
    "did open outside": lambda f: (f.parent / "outside").read_text() or load(f),
    "did open to write": lambda f: (f / "new").touch() or load(f),
    "did subprocess.Popen": lambda f: subprocess.run(["true"]) and load(f),
    "did os.system": lambda f: os.system("true") or load(f),
    "did socket.__new__": lambda f: socket.socket().close() or load(f),
    "did compile": lambda f: eval("0") or load(f),
    "did import": lambda f: __import__("wave") and load(f),
    "did os.remove": lambda f: (f / "new").unlink() or load(f),
}
for expected, InfluenceReport.load in loads.items():
    InfluenceReport.load = staticmethod(InfluenceReport.load)
    verdict, detail = judge(watch, folder, False)
    assert verdict in (expected, expected.split()[0]), (expected, verdict, detail)
    assert verdict != "did" or expected.split()[1] in detail, (expected, detail)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path.resolve())], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- single kinds of damage ----


@pytest.fixture
def plain_report(tmp_path: Path) -> Path:
    return save_plain(tmp_path / "report")


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return save_former(tmp_path / "report")


@pytest.fixture
def chains(tmp_path: Path) -> Path:
    return save_chains(tmp_path / "report")


@pytest.mark.parametrize("name", [*store.FILES, *attribution_store.FILES, *legacy.FILES])
@pytest.mark.parametrize("kind", ["outside", "zero", "loop", "pipe", "folder"])
def test_links_and_pipes_are_not_opened(tmp_path: Path, name: str, kind: str) -> None:
    """A good file behind the link makes no difference: what it shows may not be the sender's to show."""
    chains = (save_former if name in legacy.FILES else save_chains)(tmp_path / "report")
    path = chains / name
    if name == store.MARGINS:  # these chains have none
        pq.write_table(store.MARGINS_SCHEMA.empty_table(), path)
    shutil.move(path, chains.parent / name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"outside": chains.parent / name, "zero": Path("/dev/zero"), "loop": path}[kind])
    with pytest.raises(ReportError, match=f"{name} is a link, a folder or a pipe; put the file itself there"):
        InfluenceReport.load(chains)


def test_a_pending_folder_that_is_a_link_is_not_followed(plain_report: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_report, tmp_path / "outside")
    (tmp_path / "outside" / "meta.json").write_text("{}")
    (plain_report / ".report-new").symlink_to(tmp_path / "outside")
    assert InfluenceReport.load(plain_report).rows == 12


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path, **options)


def test_a_bomb_is_known_before_it_is_unpacked(plain_report: Path) -> None:
    """600 MB in a file of less than one."""
    n = 40_000_000
    query = pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["self"])
    path = plain_report / "null.parquet"
    pq.write_table(pa.table({"query": query, "z": np.zeros(n)}), path, row_group_size=n)
    assert path.stat().st_size < 1_000_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ReportError, match=r"null\.parquet would unpack from"):
        InfluenceReport.load(plain_report)
    assert pa.total_allocated_bytes() - before < 2**20


@pytest.mark.long
def test_a_few_endless_texts_are_a_bomb(plain_report: Path) -> None:
    """The number of lines is right."""
    text = pa.array(["x" * 2**24] * 36, pa.large_string())
    rewrite(
        plain_report / "scores.parquet",
        lambda t: t.set_column(1, "query", text),
        compression="zstd",
        use_dictionary=False,
        row_group_size=4,
    )
    with pytest.raises(ReportError, match=r"scores\.parquet would unpack from"):
        InfluenceReport.load(plain_report)


def test_a_column_that_is_there_twice_is_named(plain_report: Path) -> None:
    rewrite(plain_report / "scores.parquet", lambda t: t.append_column("mu", t.column("mu")))
    with pytest.raises(ReportError, match=r"scores\.parquet has columns"):
        InfluenceReport.load(plain_report)


def test_types_that_arrow_would_unpickle_stay_data(plain_report: Path) -> None:
    """CVE-2023-47248: pyarrow before 14.0.1 ran the pickle in this metadata."""
    sentinel = plain_report.parent / "executed"
    hidden = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb_bytes(sentinel)}
    schema = pq.read_schema(plain_report / "scores.parquet")
    at = schema.get_field_index("mu")
    schema = schema.set(at, schema.field(at).with_metadata(hidden))
    rewrite(plain_report / "scores.parquet", lambda t: t.cast(schema))
    assert InfluenceReport.load(plain_report).rows == 12
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["meta.json", "attributions.json", "bif.json"])
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "is nested more than 40 levels"),
        ('{"a": ' * 100_000, "is not JSON"),
        ('{"a": "\\ud800"}', "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"a": 1e999}', "is not JSON"),
        ('{"a": NaN}', "is not JSON"),
        ("[]", "does not belong to a report"),
    ],
)
def test_json_that_no_report_has(tmp_path: Path, name: str, text: str, fault: str) -> None:
    chains = (save_former if name == "bif.json" else save_chains)(tmp_path / "report")
    (chains / name).write_text(text)
    with pytest.raises(ReportError, match=f"{name} {fault}"):
        InfluenceReport.load(chains)


def test_a_json_file_without_end_is_not_read(plain_report: Path) -> None:
    os.truncate(plain_report / "meta.json", 2**40)
    with pytest.raises(ReportError, match=r"meta\.json has more than 33,554,432 bytes"):
        InfluenceReport.load(plain_report)


def test_a_long_fault_is_cut(plain_report: Path) -> None:
    meta = json.loads((plain_report / "meta.json").read_text())
    (plain_report / "meta.json").write_text(json.dumps(meta | {"rows": "\x1b[31m" + "x" * 10**6}))
    with pytest.raises(ReportError) as caught:
        InfluenceReport.load(plain_report)
    assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()


STAGE_FAULTS: dict[str, tuple[Any, str]] = {
    "loss": ([1.0, 2.0], "damaged"),
    "ragged": ({"loss": [[1.0], [1.0, 2.0]]}, "damaged"),
    "loss of text": ({"loss": [["x"]]}, "damaged"),
    "query_sd": ([1.0, 2.0], "damaged"),
    "at": ([], "at of a stage"),
    "epoch": ({"at": "start"}, "at is 'start'"),
    "rows": (-5, "rows and"),
    "no rows": ({"rows": 0}, "has 0 rows"),
    "terms": (True, "a stage has 24 rows and True terms"),
    "more terms": ({"terms": 7}, r"bif_terms\.parquet has 192 lines, expected 264"),
    "notes": ("abc", "notes of a stage is 'abc'"),
    "note": ({"notes": [1]}, "no text"),
    "settings": ({"step_size": "x"}, "is no number"),
    "huge setting": ({"settings": {"n_beta": 10**400}}, "is no number"),
    "queries": ([], "not a list of queries"),
    "screens": ([{"name": "x"}], "a check is not made of"),
    "interrupted": ("no", "interrupted of a stage is 'no'"),
}


@pytest.mark.parametrize("case", STAGE_FAULTS)
def test_former_chains_whose_json_is_wrong_are_named(former: Path, case: str) -> None:
    value, fault = STAGE_FAULTS[case]
    meta = json.loads((former / "bif.json").read_text())
    meta["stages"][1] |= value if isinstance(value, dict) and case not in meta["stages"][1] else {case: value}
    (former / "bif.json").write_text(json.dumps(meta))
    with pytest.raises(ReportError, match=fault):
        InfluenceReport.load(former)


CHECK = {"name": "x", "value": 1.0, "limit": "below 1", "passed": True, "remedy": "x"}
# of the second attribution, chains with scores of terms; a case whose name is no field gives the fields
ATTRIBUTION_FAULTS: dict[str, tuple[Any, str]] = {
    "method": (5, "method of an attribution is 5"),
    "no name": ({"method": " "}, "damaged .*is no name"),
    "at": ([], "at of an attribution"),
    "epoch": ({"at": "start"}, "at is 'start'"),
    "one stage twice": ({"at": 2}, "two attributions have one method and one stage"),
    "rows": (-5, "an attribution has -5 rows"),
    "no rows": ({"rows": 0}, "an attribution has 0 rows"),
    "true rows": ({"rows": True}, "an attribution has True rows"),
    "more rows": ({"rows": 6}, r"attributions\.parquet has 15 lines, expected 16"),
    "queries": ([], "not a list of queries"),
    "query kind": ({"queries": [{"name": "q", "kind": "x", "question": "?"}]}, "query kind 'x'"),
    "columns": (["other"], r"attributions\.parquet has columns"),
    "a column that is none": ({"columns": [3]}, "hold something that is no text"),
    "ranked_by": ("nothing", "ranked_by names no column: 'nothing'"),
    "checks": ([{"name": "x"}], "a check is not made of"),
    "a check's value": ({"checks": [CHECK | {"value": "many"}]}, "damaged .*many"),
    "arrays": ({"loss": "x"}, "does not tell their shapes"),
    "array below": ({"arrays": {"loss": [-2, 3]}}, "does not tell their shapes"),
    "larger array": ({"arrays": {"loss": [2, 4]}}, r"attribution_arrays\.parquet has 24 lines, expected"),
    "endless array": ({"arrays": {"loss": [10**9] * 9}}, r"attribution_arrays\.parquet has 24 lines, expected"),
    "notes": ("abc", "notes of an attribution is 'abc'"),
    "note": ({"notes": [1]}, "hold something that is no text"),
    "settings": ([], "settings of an attribution"),
    "known": ([[]], "hold something that is no text"),
    "layers": (["a"], r"attribution_layers\.parquet has 10 lines, expected 15"),
    "terms": (True, "an attribution has True terms"),
    "more terms": ({"terms": 7}, r"attribution_tokens\.parquet has 9 lines, expected 7"),
    "a field too many": ({"more": 1}, "an attribution is not made of"),
}


@pytest.mark.parametrize("case", ATTRIBUTION_FAULTS)
def test_attributions_whose_json_is_wrong_are_named(chains: Path, case: str) -> None:
    value, fault = ATTRIBUTION_FAULTS[case]
    meta = json.loads((chains / "attributions.json").read_text())
    meta["attributions"][1] |= value if isinstance(value, dict) and case not in FIELDS else {case: value}
    (chains / "attributions.json").write_text(json.dumps(meta))
    with pytest.raises(ReportError, match=fault):
        InfluenceReport.load(chains)


def column(name: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    """Puts values in place of a column's first ones."""

    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        kept = table.column(name).to_pylist()[len(values) :]
        return table.set_column(at, name, pa.array(values + kept, table.schema.field(at).type))

    return change


TABLE_FAULTS: dict[str, tuple[str, str, list[Any], str]] = {
    "another attribution": ("attributions", "attribution", [1], "name different attributions or queries"),
    "another query": ("attributions", "query", [1], "name different attributions or queries"),
    "a row twice": ("attributions", "row", [1], "rows are there twice"),
    "a row below 0": ("attributions", "row", [-1], "rows are there twice, or below 0"),
    "a row that is null": ("attributions", "row", [None], "column row has nulls"),
    "a layer twice": ("attribution_layers", "layer", [1], "scores of layers are in another order"),
    "a layer's row": ("attribution_layers", "row", [4], "rows differ"),
    "a term twice": ("attribution_tokens", "term", [1], "terms are in another order"),
    "a term's row": ("attribution_tokens", "row", [4], "rows differ"),
    "a term of no row": ("attribution_tokens", "row", [11], "rows differ"),
    "an array of another": ("attribution_arrays", "attribution", [1], "name different arrays"),
}


@pytest.mark.parametrize("case", TABLE_FAULTS)
def test_tables_of_attributions_that_contradict_their_json_are_named(chains: Path, case: str) -> None:
    table, name, values, fault = TABLE_FAULTS[case]
    rewrite(chains / f"{table}.parquet", column(name, values))
    with pytest.raises(ReportError, match=fault):
        InfluenceReport.load(chains)


def test_scores_of_rows_that_f_ine_has_not_are_shown_without_agreement(chains: Path) -> None:
    rewrite(chains / "attributions.parquet", column("row", [100, 101, 102, 103, 104]))
    report = InfluenceReport.load(chains)
    found = report.stages("BIF")
    assert "not scored by f-INE" in str(InfluenceReport(report.scores, report.run, found[:1]))
    assert found[0].rows.tolist() == [100, 101, 102, 103, 104] and found[1].rows.tolist() == [0, 1, 2, 3, 4]


# ---- killed while saving ----


def test_killed_at_every_step_of_a_save(tmp_path: Path) -> None:
    folder, found = tmp_path / "report", []
    with saver.Saver(folder) as process:
        for step in range(500):
            shutil.rmtree(folder, ignore_errors=True)
            saver.OLD.save(folder)
            killed = process.killed_before(step)
            found.append(saver.which(folder))
            if step % 10 == 0:  # the next save mends it
                saver.OLD.save(folder)
                assert saver.which(folder) == "old" and not (folder / ".report-new").exists()
            if not killed:
                break
    assert not killed and len(found) > 20
    assert found == sorted(found, reverse=True) and len(set(found)) == 2  # old up to one step, then new


def killed_at_random(folder: Path, kills: int) -> None:
    moments, found = random.Random(0), []
    saver.OLD.save(folder)
    with saver.Saver(folder) as process:
        for _ in range(kills):
            process.killed_after(moments.uniform(0.0, 0.25))
            found.append(saver.which(folder))
    assert set(found) == {"old", "new"}


@pytest.mark.long
def test_killed_at_random_moments(tmp_path: Path) -> None:
    killed_at_random(tmp_path / "report", 36)


@pytest.mark.long
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    killed_at_random(tmp_path / "report", 1000)


@pytest.mark.parametrize(
    ("name", "value"), [("mu", 1e308), ("mu", -1e308), ("se", 1e308), ("null_sd", 5e-324), ("null_mu", 1e308)]
)
def test_numbers_that_no_run_makes_are_drawn_all_the_same(name: str, value: float, tmp_path: Path) -> None:
    scores = example_report(60).scores
    array = getattr(scores, name).copy()
    array.flat[3] = value
    report = InfluenceReport(dataclasses.replace(scores, **{name: array}))
    report.figure().savefig(file := BytesIO(), format="svg")
    assert b"<svg" in file.getvalue()
    page = report.write_html(tmp_path / "r.html").read_text("utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])  # JSON, so no infinity is in it
    drawn = [
        np.frombuffer(b64decode(query[name]), "<f4") for query in data["queries"] for name in ("mu", "se", "height")
    ]
    assert len(drawn) == 9 and not np.isinf(drawn).any()
