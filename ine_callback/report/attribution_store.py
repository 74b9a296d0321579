"""Attributions on disk: Parquet files of numbers, one JSON file of everything else. Data only.

attributions.json            for every attribution its queries, checks, settings, notes and the arrays' shapes
attributions.parquet         one line for every attribution, query and row
attribution_layers.parquet   one line for every attribution, query, row and layer, where there are any
attribution_tokens.parquet   one line for every attribution, query and term of a row's loss, where there are any
attribution_arrays.parquet   one line for every number of further arrays, in the order of their names

An attribution is named by its position. A number that an attribution does not have is null in its lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ine_callback.report.files import find
from ine_callback.report.reading import FAULTS, ReportError, is_count, read_format, read_table
from ine_callback.report.store import doubles, queries_fault, write_table
from ine_callback.scores import Attribution, Check, Floats, LayerScores, QueryInfo, TokenScores
from ine_callback.utilities.jsonable import jsonable

FORMAT, VERSION = "ine_callback.attributions", 1
FILES = META, SCORES, LAYERS, TOKENS, ARRAYS = (
    "attributions.json",
    "attributions.parquet",
    "attribution_layers.parquet",
    "attribution_tokens.parquet",
    "attribution_arrays.parquet",
)
OPTIONAL = ("se", "p", "q")
TEXTS = ("method", "ranked_by", "title", "headline", "legend")
FIELDS = {
    **dict.fromkeys(TEXTS, str), "at": (int, str), "rows": int, "queries": list, "columns": list, "checks": list,
    "settings": dict, "arrays": dict, "notes": list, "known": list, "layers": list, "terms": int,
}  # fmt: skip
OF_CHECKS = {"name": str, "value": (int, float, str, type(None)), "limit": str, "passed": bool, "remedy": str}
KNOWN = (*OPTIONAL, "doubtful", "token_se", "token_q")  # parts that an attribution may lack


def write(found: Sequence[Attribution], folder: Path) -> None:
    """Writes what there is into an existing folder: nothing without attributions."""
    if not found:
        return
    columns = sorted({name for each in found for name in each.columns})
    write_table(pa.concat_tables(_rows_table(k, each, columns) for k, each in enumerate(found)), folder / SCORES)
    layers = [_layers_table(k, each.layers, each.rows) for k, each in enumerate(found) if each.layers is not None]
    tokens = [_tokens_table(k, each.tokens, each.rows) for k, each in enumerate(found) if each.tokens is not None]
    for name, parts in ((LAYERS, layers), (TOKENS, tokens)):
        if parts:
            write_table(pa.concat_tables(parts), folder / name)
    arrays = [_arrays_table(k, each.arrays) for k, each in enumerate(found) if each.arrays]
    if arrays:
        write_table(pa.concat_tables(arrays), folder / ARRAYS)
    meta = {"format": FORMAT, "format_version": VERSION, "attributions": [_meta(each) for each in found]}
    text = json.dumps(jsonable(meta, "attributions"), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / META).write_text(text + "\n", encoding="utf-8")


def _schema(integers: Sequence[str], numbers: Sequence[str]) -> pa.Schema:
    return pa.schema(dict.fromkeys(("attribution", *integers), pa.int64()) | dict.fromkeys(numbers, pa.float64()))


def _rows_schema(columns: Sequence[str]) -> pa.Schema:
    names = ("scores", *OPTIONAL, "doubtful", *(f"column {name}" for name in columns))
    return _schema(("query", "row"), names)


LAYERS_SCHEMA = _schema(("query", "row", "layer"), ("scores",))
TOKENS_SCHEMA = _schema(("query", "row", "term"), ("scores", "se", "q"))
ARRAYS_SCHEMA = _schema((), ("values",))


def _rows_table(position: int, found: Attribution, columns: Sequence[str]) -> pa.Table:
    rows, queries = found.scores.shape
    doubtful = None if found.doubtful is None else found.doubtful.astype(np.float64)
    numbers = {"scores": found.scores, "doubtful": doubtful} | {name: getattr(found, name) for name in OPTIONAL}
    numbers |= {f"column {name}": found.columns.get(name) for name in columns}
    empty = np.full((rows, queries), np.nan)
    table: dict[str, Any] = {
        "attribution": np.full(rows * queries, position),
        "query": np.repeat(np.arange(queries), rows),
        "row": np.tile(found.rows, queries),
    }
    table |= {name: doubles((empty if value is None else value).T.ravel()) for name, value in numbers.items()}
    return pa.table(table, _rows_schema(columns))


def _layers_table(position: int, layers: LayerScores, rows: NDArray[np.int64]) -> pa.Table:
    count, names, queries = layers.scores.shape
    return pa.table(
        {
            "attribution": np.full(layers.scores.size, position),
            "query": np.repeat(np.arange(queries), count * names),
            "row": np.tile(np.repeat(rows, names), queries),
            "layer": np.tile(np.arange(names), queries * count),
            "scores": doubles(layers.scores.transpose(2, 0, 1).ravel()),
        },
        LAYERS_SCHEMA,
    )


def _tokens_table(position: int, tokens: TokenScores, rows: NDArray[np.int64]) -> pa.Table:
    terms, queries = tokens.scores.shape
    lengths = np.diff(tokens.offsets)
    empty = np.full((terms, queries), np.nan)
    numbers = {name: getattr(tokens, name) for name in ("scores", "se", "q")}
    table: dict[str, Any] = {
        "attribution": np.full(terms * queries, position),
        "query": np.repeat(np.arange(queries), terms),
        "row": np.tile(np.repeat(rows, lengths), queries),
        "term": np.tile(np.arange(terms) - np.repeat(tokens.offsets[:-1], lengths), queries),
    }
    table |= {name: doubles((empty if value is None else value).T.ravel()) for name, value in numbers.items()}
    return pa.table(table, TOKENS_SCHEMA)


def _arrays_table(position: int, arrays: Mapping[str, Floats]) -> pa.Table:
    values = np.concatenate([arrays[name].ravel() for name in sorted(arrays)])
    return pa.table({"attribution": np.full(values.size, position), "values": doubles(values)}, ARRAYS_SCHEMA)


def _meta(found: Attribution) -> dict[str, Any]:
    tokens = found.tokens
    parts = {name: getattr(found, name) for name in (*OPTIONAL, "doubtful")}
    parts |= {"token_se": tokens and tokens.se, "token_q": tokens and tokens.q}
    return {name: getattr(found, name) for name in TEXTS} | {
        "at": found.at,
        "rows": len(found.rows),
        "queries": [vars(query) for query in found.queries],
        "columns": list(found.columns),
        "checks": [vars(check) for check in found.checks],
        "settings": dict(found.settings),
        "arrays": {name: value.shape for name, value in found.arrays.items()},
        "notes": list(found.notes),
        "known": [name for name in KNOWN if parts[name] is not None],
        "layers": [] if found.layers is None else list(found.layers.names),
        "terms": 0 if tokens is None else len(tokens.scores),
    }


def load(folder: Path) -> tuple[Attribution, ...]:
    """Reads what :func:`write` wrote; empty where there is nothing.

    Raises:
        ReportError: When the files are damaged or do not belong together.
    """
    if find(folder, META) is None:
        return ()
    meta = read_format(folder, META, FORMAT, VERSION)
    metas = meta.get("attributions")
    fault = _fault(metas)
    if fault:
        raise ReportError(folder, f"{META}: {fault}")
    assert isinstance(metas, list)
    columns = sorted({name for each in metas for name in each["columns"]})
    rows = _parts(folder, SCORES, _rows_schema(columns), metas, lambda each: each["rows"])
    layers = _parts(folder, LAYERS, LAYERS_SCHEMA, metas, lambda each: each["rows"] * len(each["layers"]))
    tokens = _parts(folder, TOKENS, TOKENS_SCHEMA, metas, lambda each: each["terms"])
    arrays = _arrays(folder, metas)
    try:
        return tuple(_built(each, rows[k], layers.get(k), tokens.get(k), arrays[k]) for k, each in enumerate(metas))
    except FAULTS as error:
        raise ReportError(folder, f"{META} or a Parquet file of attributions is damaged ({error})") from error


def fields_fault(found: Any, kinds: dict[str, Any], what: str) -> str:
    """Why a JSON value is no object with these fields; empty if it is."""
    if not isinstance(found, dict) or set(found) != set(kinds):
        return f"{what} is not made of {sorted(kinds)}"
    wrong = [name for name, kind in kinds.items() if not isinstance(found[name], kind)]
    return f"{wrong[0]} of {what} is {found[wrong[0]]!r}" if wrong else ""


def part_fault(found: Any, kinds: dict[str, Any], what: str, checks: str) -> str:
    """Why a JSON value is no object with these fields, queries, checks under this name and a stage; empty if it is."""
    fault = fields_fault(found, kinds, what) or queries_fault(found["queries"])
    for check in [] if fault else found[checks]:
        fault = fault or fields_fault(check, OF_CHECKS, "a check")
    if not fault and found["at"] != "end" and not is_count(found["at"]):
        return f"at is {found['at']!r}, neither 'end' nor a number of epochs"
    return fault


def _fault(metas: Any) -> str:
    """Why a JSON value does not describe attributions; empty if it does."""
    if not isinstance(metas, list) or not metas:
        return "attributions is not a list of attributions"
    fault = next((found for each in metas if (found := _one_fault(each))), "")
    if fault:
        return fault
    pairs = {(each["method"], each["at"]) for each in metas}
    return "two attributions have one method and one stage" if len(pairs) < len(metas) else ""


def _one_fault(found: Any) -> str:
    if fault := part_fault(found, FIELDS, "an attribution", "checks"):
        return fault
    if not is_count(found["rows"]) or not found["rows"]:
        return f"an attribution has {found['rows']!r} rows"
    lists = [found[name] for name in ("columns", "notes", "known", "layers")]
    if not all(isinstance(part, str) for each in lists for part in each):
        return "columns, notes, known or layers hold something that is no text"
    if found["ranked_by"] and found["ranked_by"] not in found["columns"]:
        return f"ranked_by names no column: {found['ranked_by']!r}"
    if not is_count(found["terms"]):
        return f"an attribution has {found['terms']!r} terms"
    shapes = found["arrays"].values()
    known = all(isinstance(shape, list) and all(is_count(length) for length in shape) for shape in shapes)
    return "" if known else "arrays does not tell their shapes"


def _parts(
    folder: Path, name: str, schema: pa.Schema, metas: list[Any], each: Callable[[Any], int]
) -> dict[int, pa.Table]:
    """The lines of each attribution by its position; it has ``each`` of them for every query, in the queries' order."""
    counts = {k: each(meta) for k, meta in enumerate(metas) if each(meta)}
    if not counts:
        return {}
    lines = {k: count * len(metas[k]["queries"]) for k, count in counts.items()}
    table, start, found = read_table(folder, name, schema, sum(lines.values())), 0, {}
    for k, length in lines.items():
        part = table.slice(start, length)
        start += length
        queries = np.repeat(np.arange(len(metas[k]["queries"])), counts[k])
        if not np.array_equal(_integers(part, "query"), queries) or (_integers(part, "attribution") != k).any():
            raise ReportError(folder, f"{name} and {META} name different attributions or queries")
        found[k] = part
    return found


def _arrays(folder: Path, metas: list[Any]) -> list[dict[str, Floats]]:
    """Each attribution's further arrays by name."""
    shapes = [(k, name, meta["arrays"][name]) for k, meta in enumerate(metas) for name in sorted(meta["arrays"])]
    found: list[dict[str, Floats]] = [{} for _ in metas]
    if not shapes:
        return found
    table = read_table(folder, ARRAYS, ARRAYS_SCHEMA, sum(math.prod(shape) for _, _, shape in shapes))
    values, start = np.asarray(table.column("values").to_numpy(), dtype=np.float64), 0
    owners = np.repeat([k for k, _, _ in shapes], [math.prod(shape) for _, _, shape in shapes])
    if not np.array_equal(_integers(table, "attribution"), owners):
        raise ReportError(folder, f"{ARRAYS} and {META} name different arrays")
    for k, name, shape in shapes:
        stop = start + math.prod(shape)
        found[k][name] = values[start:stop].reshape(shape)
        start = stop
    return found


def _built(
    meta: dict[str, Any], table: pa.Table, layers: pa.Table | None, tokens: pa.Table | None, arrays: dict[str, Floats]
) -> Attribution:
    queries = tuple(QueryInfo(**query) for query in meta["queries"])
    shape = (len(queries), meta["rows"])
    rows = _rows(table, shape, np.ones(meta["rows"], dtype=np.int64))
    known: dict[str, Any] = {
        name: _column(table, name, shape) for name in (*OPTIONAL, "doubtful") if name in meta["known"]
    }
    doubtful = known.pop("doubtful", None)
    return Attribution(
        rows=rows,
        queries=queries,
        scores=_column(table, "scores", shape),
        columns={name: _column(table, f"column {name}", shape) for name in meta["columns"]},
        doubtful=None if doubtful is None else doubtful == 1,
        layers=None if layers is None else _layers(meta, layers, rows),
        tokens=None if tokens is None else _tokens(meta, tokens, rows),
        checks=tuple(Check(**(check | {"value": number(check["value"])})) for check in meta["checks"]),
        settings=meta["settings"],
        arrays={name: arrays[name] for name in meta["arrays"]},
        notes=tuple(meta["notes"]),
        at=meta["at"],
        **known,
        **{name: meta[name] for name in TEXTS},
    )


def _layers(meta: dict[str, Any], table: pa.Table, rows: NDArray[np.int64]) -> LayerScores:
    names = tuple(meta["layers"])
    shape = (len(meta["queries"]), len(rows), len(names))
    if not np.array_equal(_integers(table, "layer"), np.tile(np.arange(len(names)), len(rows) * shape[0])):
        raise ValueError("scores of layers are in another order")
    _same_rows(table, rows, np.full(len(rows), len(names)), shape[0])
    scores = np.asarray(table.column("scores").to_numpy(), dtype=np.float64).reshape(shape)
    return LayerScores(names, np.ascontiguousarray(scores.transpose(1, 2, 0)))


def _tokens(meta: dict[str, Any], table: pa.Table, rows: NDArray[np.int64]) -> TokenScores:
    shape = (len(meta["queries"]), meta["terms"])
    order = np.argsort(rows)
    place = np.searchsorted(rows[order], _integers(table, "row")[: shape[1]])
    lengths = np.bincount(order[np.minimum(place, len(rows) - 1)], minlength=len(rows))
    _same_rows(table, rows, lengths, shape[0])
    terms = np.arange(shape[1]) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if not np.array_equal(_integers(table, "term"), np.tile(terms, shape[0])):
        raise ValueError("terms are in another order")
    optional = {name: _column(table, name, shape) for name in ("se", "q") if f"token_{name}" in meta["known"]}
    return TokenScores(np.concatenate([[0], np.cumsum(lengths)]), _column(table, "scores", shape), **optional)


def _rows(table: pa.Table, shape: tuple[int, int], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row ids [R] of lines [Q, R]: each once, the same for every query."""
    rows = _integers(table, "row")[: shape[1]]
    _same_rows(table, rows, lengths, shape[0])
    if len(np.unique(rows)) < len(rows) or rows.min() < 0:
        raise ValueError("rows are there twice, or below 0")
    return rows


def _same_rows(table: pa.Table, rows: NDArray[np.int64], lengths: NDArray[np.int64], queries: int) -> None:
    if not np.array_equal(_integers(table, "row"), np.tile(np.repeat(rows, lengths), queries)):
        raise ValueError("rows differ between queries, layers or terms")


def _integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(table.column(name).to_numpy(), dtype=np.int64)


def _column(table: pa.Table, name: str, shape: tuple[int, int]) -> Floats:
    """Numbers [R, Q] of lines [Q, R]; null becomes NaN."""
    found = np.asarray(table.column(name).to_numpy(), dtype=np.float64).reshape(shape)
    return np.ascontiguousarray(found.T)


def number(value: Any) -> float:
    """JSON has neither NaN (null) nor infinity (text)."""
    return float("nan") if value is None else float(value)
