"""BIF's part of a report on disk: Parquet files of scores, one JSON file of settings and screens. Data only.

bif.parquet         one line for every stage, query and row
bif_terms.parquet   one line for every stage, query, row and term, with `per_token`
bif.json            for every stage queries, settings, screens and the chains' trace; written last, so that a folder
                    without it holds no chains
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ine_callback.bif.scores import BIFScores, Screen, TermScores
from ine_callback.report.runinfo import jsonable
from ine_callback.report.store import ReportError, doubles
from ine_callback.scores import QueryInfo

SCORES, TERMS, META, FORMAT, VERSION = "bif.parquet", "bif_terms.parquet", "bif.json", "ine_callback.bif", 2
MATRICES = ("scores", "se", "p", "q", "plain", "plain_se", "laplace", "trend", "size")
OF_TERMS = ("scores", "se", "q")


def save(stages: Sequence[BIFScores], folder: Path) -> None:
    """Writes all files; without chains it removes those of a former report."""
    (folder / META).unlink(missing_ok=True)
    for name, table in ((SCORES, _rows_table), (TERMS, _terms_table)):
        parts = [table(found) for found in stages if name == SCORES or found.terms is not None]
        if parts:
            pq.write_table(pa.concat_tables(parts), folder / name, compression="zstd", write_page_checksum=True)
        else:
            (folder / name).unlink(missing_ok=True)
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
    return pa.table(columns)


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
    return pa.table(columns)


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
    """Reads what :func:`save` wrote; empty where there are no chains.

    Raises:
        ReportError: When the files are damaged or do not belong together.
    """
    if not (folder / META).is_file():
        return ()
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT or meta.get("format_version") != VERSION:
            raise ValueError(f"its format is not {FORMAT!r} {VERSION}")
        metas = meta["stages"]
        rows = _read(folder / SCORES, metas, lambda m: m["rows"] * len(m["queries"]))
        terms = [m for m in metas if m["terms"]]
        of_terms = _read(folder / TERMS, terms, lambda m: m["rows"] * m["terms"] * len(m["queries"])) if terms else {}
        return tuple(_built(m, rows[str(m["at"])], of_terms.get(str(m["at"]))) for m in metas)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OSError, pa.ArrowException) as error:
        raise ReportError(folder, f"{META} or a Parquet file of BIF is damaged ({error})") from error


def _read(file: Path, metas: list[Any], lines: Any) -> Mapping[str, pa.Table]:
    """The lines of each stage."""
    table = pq.ParquetFile(file, page_checksum_verification=True).read()
    found, start = {}, 0
    for meta in metas:
        part = table.slice(start, lines(meta))
        start += lines(meta)
        names = np.repeat([query["name"] for query in meta["queries"]], len(part) // len(meta["queries"])).tolist()
        if part.column("query").to_pylist() != names or set(part.column("at").to_pylist()) != {str(meta["at"])}:
            raise ValueError(f"{file.name} and {META} name different queries or stages")
        found[str(meta["at"])] = part
    if start != len(table):
        raise ValueError(f"{file.name} has {len(table)} lines, {META} tells of {start}")
    return found


def _built(meta: dict[str, Any], table: pa.Table, of_terms: pa.Table | None) -> BIFScores:
    queries = tuple(QueryInfo(**query) for query in meta["queries"])
    screens = [Screen(**(screen | {"value": _number(screen["value"])})) for screen in meta["screens"]]
    matrices = {name: _column(table, name).reshape(len(queries), -1) for name in (*MATRICES, "row_sd")}
    terms = None
    if of_terms is not None:
        shape = (len(queries), meta["rows"], meta["terms"])
        terms = TermScores(*(_column(of_terms, name).reshape(shape).transpose(1, 2, 0) for name in OF_TERMS))
    return BIFScores(
        rows=np.asarray(table.column("row").to_numpy(), dtype=np.int64).reshape(len(queries), -1)[0],
        queries=queries,
        row_sd=matrices.pop("row_sd")[0],
        query_sd=np.array([_number(value) for value in meta["query_sd"]]),
        loss=np.array(meta["loss"], dtype=np.float64),
        screens=tuple(screens),
        settings=meta["settings"],
        notes=tuple(meta["notes"]),
        at=meta["at"],
        terms=terms,
        interrupted=meta["interrupted"],
        **{name: matrix.T for name, matrix in matrices.items()},
    )


def _column(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(table.column(name).to_numpy(), dtype=np.float64)  # null becomes NaN


def _number(value: Any) -> float:
    """JSON has neither NaN (null) nor infinity (text)."""
    return float("nan") if value is None else float(value)
