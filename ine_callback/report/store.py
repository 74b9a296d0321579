"""A report on disk: two or three Parquet files and one JSON file. Data only; loading never executes anything.

scores.parquet   one line for every query and row; null where the row was never observed; without queries one
                 line for every row, whose query is empty: its observations and mean loss
null.parquet     draws of mu / null_sd under the permutation null
margins.parquet  one line for every row, its mean margin in each window of visits; only where they were known
meta.json        format, queries with their units and losses, provenance
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ine_callback.report.files import find
from ine_callback.report.reading import FAULTS, QUERY, ReportError, is_count, is_number, read_json, read_table
from ine_callback.report.runinfo import RunInfo
from ine_callback.report.validate import MATRICES
from ine_callback.scores import WINDOWS, Floats, QueryInfo, QueryKind, Scores

FORMAT, VERSION = "ine_callback.report", 1
NO_NAME = ""  # stands for the query where f-INE scored none
FILES = SCORES, NULL, META, MARGINS = "scores.parquet", "null.parquet", "meta.json", "margins.parquet"
OPTIONAL = "unit", "query_loss"  # of each query, in meta.json; not in reports of 0.1
_DOUBLES = (*MATRICES, "mean_loss")
SCORES_SCHEMA = pa.schema(
    [("row", pa.int64()), ("query", QUERY), ("observations", pa.int64())] + [(name, pa.float64()) for name in _DOUBLES]
)
MARGINS_SCHEMA = pa.schema([(f"window_{k}", pa.float64()) for k in range(WINDOWS)])
NULL_SCHEMA = pa.schema([("query", QUERY), ("z", pa.float64())])


def write(scores: Scores, run: RunInfo, folder: Path) -> None:
    """Writes the files into an existing folder."""
    write_table(_scores_table(scores), folder / SCORES)
    write_table(_null_table(scores), folder / NULL)
    if scores.margins is not None:
        columns = [doubles(np.ascontiguousarray(window)) for window in scores.margins.T]
        write_table(pa.table(columns, schema=MARGINS_SCHEMA), folder / MARGINS)
    text = json.dumps(_meta(scores, run), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / META).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Scores, RunInfo]:
    """Reads and checks the files.

    Raises:
        ReportError: When something is missing, foreign, damaged or inconsistent.
    """
    meta = _read_meta(folder)
    n = meta["rows"]
    queries = tuple(QueryInfo(**query) for query in meta["queries"])
    names = [query.name for query in queries]
    asked = names or [NO_NAME]
    table = read_table(folder, SCORES, SCORES_SCHEMA, n * len(asked))
    cell = _cells(folder, table, asked, n)
    matrices = {name: _scatter(table, name, cell, n, len(asked))[:, : len(names)] for name in MATRICES}
    repeated = {name: _scatter(table, name, cell, n, len(asked)) for name in ("observations", "mean_loss")}
    for name, matrix in repeated.items():
        if not np.array_equal(matrix, np.repeat(matrix[:, :1], len(asked), axis=1), equal_nan=True):
            raise ReportError(folder, f"{SCORES}: {name} of a row differs between queries")
    scores = Scores(
        queries=queries,
        observations=repeated["observations"][:, 0].astype(np.int64),
        mean_loss=repeated["mean_loss"][:, 0].copy(),
        null_mu=_null_draws(folder, names),
        null_ks_p=_numbers(meta["null_ks_p"]),
        margins=_margins(folder, n),
        unit=_optional(meta, "unit"),
        query_loss=_optional(meta, "query_loss"),
        **matrices,
    )
    return scores, meta["run"]


def _numbers(values: list[float | None]) -> Floats:
    """A JSON list, in which null stands for NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _optional(meta: dict[str, Any], name: str) -> Floats | None:
    return None if meta.get(name) is None else _numbers(meta[name])


def _listed(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _margins(folder: Path, n: int) -> Floats | None:
    """Mean margins [N, 8]; None where the file is not there, as in reports of 0.1."""
    if find(folder, MARGINS) is None:
        return None
    table = read_table(folder, MARGINS, MARGINS_SCHEMA, n)
    return np.stack([table.column(name).to_numpy() for name in MARGINS_SCHEMA.names], axis=1)


def _scores_table(scores: Scores) -> pa.Table:
    n, q = scores.mu.shape
    matrices = {name: getattr(scores, name) if q else np.full((n, 1), np.nan) for name in MATRICES}
    columns = {
        "row": pa.array(np.tile(np.arange(n, dtype=np.int64), max(1, q))),
        "query": query_column(scores, n) if q else pa.array([NO_NAME] * n).dictionary_encode(),
        "observations": pa.array(np.tile(scores.observations, max(1, q))),
        "mean_loss": doubles(np.tile(scores.mean_loss, max(1, q))),
    } | {name: doubles(matrix.T.ravel()) for name, matrix in matrices.items()}
    return pa.table([columns[name] for name in SCORES_SCHEMA.names], schema=SCORES_SCHEMA)


def _null_table(scores: Scores) -> pa.Table:
    return pa.table(
        [query_column(scores, scores.null_mu.shape[1]), doubles(scores.null_mu.ravel())], schema=NULL_SCHEMA
    )


def query_column(scores: Scores, each: int) -> pa.DictionaryArray:
    """Each query's name ``each`` times, one query after the other."""
    codes = pa.array(np.repeat(np.arange(len(scores.queries), dtype=np.int32), each))
    return pa.DictionaryArray.from_arrays(codes, pa.array([query.name for query in scores.queries], pa.string()))


def doubles(values: NDArray[np.float64]) -> pa.Array:
    """NaN becomes null: what readers of Parquet expect."""
    return pa.array(values, pa.float64(), from_pandas=True)


def write_table(table: pa.Table, path: Path) -> None:
    """With checksums, so that a damaged file is known as one."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _meta(scores: Scores, run: RunInfo) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "rows": len(scores.observations),
        "queries": [{"name": each.name, "kind": each.kind, "question": each.question} for each in scores.queries],
        "null_ks_p": _listed(scores.null_ks_p),
        **{name: _listed(values) for name in OPTIONAL if (values := getattr(scores, name)) is not None},
        "run": run.to_dict(),
    }


def _read_meta(folder: Path) -> dict[str, Any]:
    """The checked contents of meta.json, with ``run`` as a RunInfo."""
    if not folder.is_dir():
        raise ReportError(folder, "no such folder")
    missing = [name for name in (META, SCORES, NULL) if find(folder, name) is None]
    if missing:
        raise ReportError(folder, f"{', '.join(missing)} missing")
    meta = read_json(folder, META)
    if meta.get("format") != FORMAT:
        raise ReportError(folder, f"{META} does not belong to a report (its format is not {FORMAT!r})")
    if meta.get("format_version") != VERSION:
        found = meta.get("format_version")
        raise ReportError(folder, f"format version is {found!r}, this release reads {VERSION}", "upgrade ine_callback")
    fault = _meta_fault(meta)
    if fault:
        raise ReportError(folder, f"{META}: {fault}")
    try:
        return meta | {"run": RunInfo.from_dict(meta["run"])}
    except FAULTS as error:
        raise ReportError(folder, f"{META}: {error}") from error


def _meta_fault(meta: dict[str, Any]) -> str:
    rows = meta.get("rows")
    if not is_count(rows):
        return f"rows is {rows!r}, not a count"
    fault = queries_fault(meta.get("queries")) if meta.get("queries") != [] else ""
    if fault:
        return fault
    for name in ("null_ks_p", *(name for name in OPTIONAL if meta.get(name) is not None)):
        values = meta.get(name)
        if not isinstance(values, list) or len(values) != len(meta["queries"]):
            return f"{name} is not a list of {len(meta['queries'])} numbers"
        if not all(value is None or is_number(value) for value in values):
            return f"{name} holds something that is not a number"
    return "" if isinstance(meta.get("run"), dict) else "run is not an object"


def queries_fault(queries: Any) -> str:
    """Why a JSON value does not list queries; empty if it does."""
    if not isinstance(queries, list) or not queries:
        return "queries is not a list of queries"
    for query in queries:
        fields = {"name", "kind", "question"}
        if not isinstance(query, dict) or set(query) != fields or not all(isinstance(v, str) for v in query.values()):
            return f"a query is not made of {sorted(fields)}"
        if query["kind"] not in get_args(QueryKind):
            return f"query kind {query['kind']!r} is none of {get_args(QueryKind)}"
    names = [query["name"] for query in queries]
    return "" if len(set(names)) == len(names) else "two queries have one name"


def _codes(folder: Path, name: str, column: pa.ChunkedArray, names: list[str]) -> NDArray[np.int64]:
    """Column of each line's query; -1 never occurs in what is returned."""
    codes = pc.index_in(column.cast(pa.string()), value_set=pa.array(names, pa.string()))
    if codes.null_count:
        raise ReportError(folder, f"{name} has queries that {META} does not name")
    return np.asarray(codes.to_numpy(), dtype=np.int64)


def _cells(folder: Path, table: pa.Table, names: list[str], n: int) -> NDArray[np.int64]:
    """Flat position ``query * N + row`` of each line; every position occurs exactly once."""
    rows = table.column("row").to_numpy()
    if rows.size and (rows.min() < 0 or rows.max() >= n):
        raise ReportError(folder, f"{SCORES} has row ids outside 0 to {n - 1}")
    cell = _codes(folder, SCORES, table.column("query"), names) * n + rows
    if bool((np.bincount(cell, minlength=n * len(names)) != 1).any()):
        raise ReportError(folder, f"{SCORES} has a row more than once for a query")
    return np.asarray(cell, dtype=np.int64)


def _scatter(table: pa.Table, name: str, cell: NDArray[np.int64], n: int, q: int) -> NDArray[np.float64]:
    flat = np.empty(n * q, dtype=np.float64)
    flat[cell] = table.column(name).to_numpy()  # null becomes NaN
    return np.ascontiguousarray(flat.reshape(q, n).T)


def _null_draws(folder: Path, names: list[str]) -> NDArray[np.float64]:
    table = read_table(folder, NULL, NULL_SCHEMA)
    codes = _codes(folder, NULL, table.column("query"), names)
    if not names:
        return np.zeros((0, 0))
    counts = np.bincount(codes, minlength=len(names))
    if bool((counts != counts[0]).any()):
        raise ReportError(folder, f"{NULL} has a different number of draws per query")
    draws = np.asarray(table.column("z").to_numpy(), dtype=np.float64)
    return draws[np.argsort(codes, kind="stable")].reshape(len(names), int(counts[0]))
