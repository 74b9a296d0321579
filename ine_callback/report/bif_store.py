"""BIF's part of a report on disk: Parquet files of scores, one JSON file of settings and screens. Data only.

bif.parquet         one line for every stage, query and row
bif_terms.parquet   one line for every stage, query, row and term, with `per_token`
bif.json            for every stage queries, settings, screens and the chains' trace; without it there are no chains
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ine_callback.methods.bif.scores import BIFScores, Screen, TermScores
from ine_callback.report import store
from ine_callback.report.files import find, replacing
from ine_callback.report.reading import FAULTS, ReportError, is_count, is_number, read_json, read_table
from ine_callback.report.runinfo import RunInfo, jsonable
from ine_callback.report.store import doubles, queries_fault, write_table
from ine_callback.scores import QueryInfo, Scores

FORMAT, VERSION = "ine_callback.bif", 2
FILES = SCORES, TERMS, META = "bif.parquet", "bif_terms.parquet", "bif.json"
MATRICES = ("scores", "se", "p", "q", "plain", "plain_se", "laplace", "trend", "size")
OF_TERMS = ("scores", "se", "q")
FIELDS = {
    "at": (int, str), "rows": int, "terms": int, "queries": list, "query_sd": list, "loss": list, "screens": list,
    "settings": dict, "notes": list, "interrupted": bool,
}  # fmt: skip
OF_SCREENS = {"name": str, "value": (int, float, str, type(None)), "limit": str, "passed": bool, "remedy": str}
SHOWN = ("step_size", "n_beta", "localization")  # settings that views format as numbers


def _schema(integers: Sequence[str], numbers: Sequence[str]) -> pa.Schema:
    kinds = {"at": pa.string()} | dict.fromkeys(integers, pa.int64()) | {"query": pa.string()}
    return pa.schema(kinds | dict.fromkeys(numbers, pa.float64()))


SCORES_SCHEMA = _schema(("row",), (*MATRICES, "row_sd"))
TERMS_SCHEMA = _schema(("row", "term"), OF_TERMS)


def save(scores: Scores, run: RunInfo, stages: Sequence[BIFScores], folder: Path) -> Path:
    """See :meth:`InfluenceReport.save`: the whole report, with its chains."""
    with replacing(folder, store.FILES + FILES) as aside:
        store.write(scores, run, aside)
        write(stages, aside)
    return folder


def write(stages: Sequence[BIFScores], folder: Path) -> None:
    """Writes what there is into an existing folder: nothing without chains, no terms without scores of terms."""
    for name, table in ((SCORES, _rows_table), (TERMS, _terms_table)):
        parts = [table(found) for found in stages if name == SCORES or found.terms is not None]
        if parts:
            write_table(pa.concat_tables(parts), folder / name)
    if stages:
        meta = {"format": FORMAT, "format_version": VERSION, "stages": [_meta(found) for found in stages]}
        text = json.dumps(jsonable(meta, "bif"), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / META).write_text(text + "\n", encoding="utf-8")


def _rows_table(found: BIFScores) -> pa.Table:
    rows, queries = found.scores.shape
    columns: dict[str, Any] = {
        "at": pa.array([str(found.at)] * (rows * queries), pa.string()),
        "row": pa.array(np.tile(found.rows, queries)),
        "query": pa.array(np.repeat([query.name for query in found.queries], rows).tolist(), pa.string()),
    }
    for name in MATRICES:
        columns[name] = doubles(getattr(found, name).T.ravel())
    columns["row_sd"] = doubles(np.tile(found.row_sd, queries))
    return pa.table(columns, SCORES_SCHEMA)


def _terms_table(found: BIFScores) -> pa.Table:
    assert found.terms is not None
    rows, terms, queries = found.terms.scores.shape
    columns: dict[str, Any] = {
        "at": pa.array([str(found.at)] * (rows * terms * queries), pa.string()),
        "row": pa.array(np.tile(np.repeat(found.rows, terms), queries)),
        "term": pa.array(np.tile(np.arange(terms), rows * queries)),
        "query": pa.array(np.repeat([query.name for query in found.queries], rows * terms).tolist(), pa.string()),
    }
    for name in OF_TERMS:
        columns[name] = doubles(getattr(found.terms, name).transpose(2, 0, 1).ravel())
    return pa.table(columns, TERMS_SCHEMA)


def _meta(found: BIFScores) -> dict[str, Any]:
    return {
        "at": found.at,
        "rows": len(found.rows),
        "terms": 0 if found.terms is None else found.terms.scores.shape[1],
        "queries": [vars(query) for query in found.queries],
        "query_sd": found.query_sd,
        "loss": found.loss,
        "screens": [vars(screen) for screen in found.screens],
        "settings": found.settings,
        "notes": found.notes,
        "interrupted": found.interrupted,
    }


def load(folder: Path) -> tuple[BIFScores, ...]:
    """Reads what :func:`write` wrote; empty where there are no chains.

    Raises:
        ReportError: When the files are damaged or do not belong together.
    """
    if find(folder, META) is None:
        return ()
    meta = read_json(folder, META)
    if meta.get("format") != FORMAT or meta.get("format_version") != VERSION:
        raise ReportError(folder, f"{META}: its format is not {FORMAT!r} {VERSION}")
    fault = _fault(meta.get("stages"))
    if fault:
        raise ReportError(folder, f"{META}: {fault}")
    metas = meta["stages"]
    rows = _parts(folder, SCORES, SCORES_SCHEMA, metas, [each["rows"] for each in metas])
    with_terms = [each for each in metas if each["terms"]]
    lines = [each["rows"] * each["terms"] for each in with_terms]
    terms = _parts(folder, TERMS, TERMS_SCHEMA, with_terms, lines) if with_terms else {}
    try:
        return tuple(_built(each, rows[each["at"]], terms.get(each["at"])) for each in metas)
    except FAULTS as error:
        raise ReportError(folder, f"{META} or a Parquet file of BIF is damaged ({error})") from error


def _fault(stages: Any) -> str:
    """Why a JSON value does not describe stages of chains; empty if it does."""
    if not isinstance(stages, list) or not stages:
        return "stages is not a list of stages"
    for stage in stages:
        fault = _fields_fault(stage, FIELDS, "a stage") or queries_fault(stage["queries"])
        for screen in [] if fault else stage["screens"]:
            fault = fault or _fields_fault(screen, OF_SCREENS, "a screen")
        if fault:
            return fault
        if stage["at"] != "end" and not is_count(stage["at"]):
            return f"at is {stage['at']!r}, neither 'end' nor a number of epochs"
        if not is_count(stage["rows"]) or not is_count(stage["terms"]) or not stage["rows"]:
            return f"a stage has {stage['rows']!r} rows and {stage['terms']!r} terms"
        if not all(isinstance(note, str) for note in stage["notes"]):
            return "notes holds something that is no text"
        if not all(is_number(stage["settings"].get(name, 0)) for name in SHOWN):
            return f"one of the settings {', '.join(SHOWN)} is no number"
    return "two stages have one name" if len({stage["at"] for stage in stages}) < len(stages) else ""


def _fields_fault(found: Any, kinds: dict[str, Any], what: str) -> str:
    if not isinstance(found, dict) or set(found) != set(kinds):
        return f"{what} is not made of {sorted(kinds)}"
    wrong = [name for name, kind in kinds.items() if not isinstance(found[name], kind)]
    return f"{wrong[0]} of {what} is {found[wrong[0]]!r}" if wrong else ""


def _parts(folder: Path, name: str, schema: pa.Schema, metas: list[Any], each: list[int]) -> dict[int | str, pa.Table]:
    """The lines of each stage, which has so many for ``each`` query, one query after the other."""
    lines = [count * len(meta["queries"]) for meta, count in zip(metas, each, strict=True)]
    table, start, found = read_table(folder, name, schema, sum(lines)), 0, {}
    for meta, count, length in zip(metas, each, lines, strict=True):
        part = table.slice(start, length)
        start += length
        names = np.repeat([query["name"] for query in meta["queries"]], count).tolist()
        if part.column("query").to_pylist() != names or set(part.column("at").to_pylist()) != {str(meta["at"])}:
            raise ReportError(folder, f"{name} and {META} name different queries or stages")
        found[meta["at"]] = part
    return found


def _built(meta: dict[str, Any], table: pa.Table, of_terms: pa.Table | None) -> BIFScores:
    queries = tuple(QueryInfo(**query) for query in meta["queries"])
    screens = [Screen(**(screen | {"value": _number(screen["value"])})) for screen in meta["screens"]]
    shape = (len(queries), meta["rows"])
    matrices = {name: _column(table, name).reshape(shape) for name in (*MATRICES, "row_sd")}
    rows, terms = _rows(table, (*shape, 1)), None
    if of_terms is not None:
        cube = (*shape, meta["terms"])
        if not np.array_equal(_rows(of_terms, cube), rows):
            raise ValueError("scores of terms are of other rows")
        terms = TermScores(*(_column(of_terms, name).reshape(cube).transpose(1, 2, 0) for name in OF_TERMS))
    return BIFScores(
        rows=rows,
        queries=queries,
        row_sd=matrices.pop("row_sd")[0],
        query_sd=_array(meta["query_sd"], len(queries)),
        loss=_array(meta["loss"], -1, len(meta["loss"][0])),
        screens=tuple(screens),
        settings=meta["settings"],
        notes=tuple(meta["notes"]),
        at=meta["at"],
        terms=terms,
        interrupted=meta["interrupted"],
        **{name: matrix.T for name, matrix in matrices.items()},
    )


def _rows(table: pa.Table, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Row ids [R] of lines [Q, R, T]: each once, the same for every query and term."""
    found = np.asarray(table.column("row").to_numpy(), dtype=np.int64).reshape(shape)
    rows = found[0, :, 0]
    if not np.array_equal(found, np.broadcast_to(rows[:, None], shape)) or len(np.unique(rows)) < len(rows):
        raise ValueError("rows differ between queries, or are there twice")
    if rows.min() < 0:
        raise ValueError(f"there is no row {rows.min()}")
    return rows


def _column(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(table.column(name).to_numpy(), dtype=np.float64)  # null becomes NaN


def _array(values: list[Any], *shape: int) -> NDArray[np.float64]:
    found = np.array([_number(value) for value in np.ravel(np.array(values, dtype=object))])
    return found.reshape(shape)


def _number(value: Any) -> float:
    """JSON has neither NaN (null) nor infinity (text)."""
    return float("nan") if value is None else float(value)
