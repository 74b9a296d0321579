"""A report's scores for other programs: Arrow, data frames, a column of a data set, and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ine_callback.report import rows as tables
from ine_callback.report.attribution_view import by_method
from ine_callback.report.files import replace_file
from ine_callback.report.markdown import markdown
from ine_callback.report.store import doubles, query_column
from ine_callback.report.table import RowScore
from ine_callback.scores import attribute_name
from ine_callback.utilities.jsonable import jsonable
from ine_callback.utilities.optional import need
from ine_callback.utilities.words import plain

if TYPE_CHECKING:
    from ine_callback.report.contents import Contents

Format = Literal["csv", "json", "parquet", "drop-list", "keep-list", "markdown"]
LISTS = ("drop-list", "keep-list")
COLUMNS = tuple(name for name in RowScore._fields if name not in ("row", "query"))


def to_arrow(report: Contents) -> pa.Table:
    """See :meth:`InfluenceReport.to_arrow`."""
    report.column()  # raises where there is no query, and so no line
    values = tables.columns(report.scores, *tables.everything(report.scores))
    arrays = {name: doubles(each) if each.dtype == np.float64 else pa.array(each) for name, each in values.items()}
    arrays |= {name: doubles(each) for name, each in _of_methods(report).items()}
    return pa.table(arrays | {"query": query_column(report.scores, report.rows)})


def _of_methods(report: Contents) -> dict[str, NDArray[np.float64]]:
    """The last scores of each fit-end method, in the lines of the rest; NaN where it did not score.

    A method whose name is a column already gets a number behind it. One that shares no query with the report has a
    column ``method/query`` for each of its own.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for stages in by_method(report.attributions).values():
        last = stages[-1]
        known = [query.name for query in last.queries]
        if not set(known) & set(report.queries):  # questions of the method's own: one number in all lines of a row
            for k, query in enumerate(known):
                there, column = last.rows < report.rows, np.full(report.rows, np.nan)
                column[last.rows[there]] = last.ranking[there, k]
                method = f"{attribute_name(last.method)}/"
                found[method + query.removeprefix(method)] = np.tile(column, len(report.queries))
            continue
        names = (attribute_name(last.method) + (f"_{k}" if k > 1 else "") for k in count(1))
        name = next(each for each in names if not {each, f"{each}_se", f"{each}_q"} & {*RowScore._fields, *found})
        for suffix, values in (("", last.ranking), ("_se", last.ranking_se), ("_q", last.q)):
            if values is None:
                continue
            column = np.full((report.rows, len(report.queries)), np.nan)
            rows = last.rows < report.rows
            for k, query in enumerate(report.queries):
                if query in known:
                    column[last.rows[rows], k] = values[rows, known.index(query)]
            found[name + suffix] = column.T.ravel()
    return found


def to_pandas(report: Contents) -> Any:
    """See :meth:`InfluenceReport.to_pandas`."""
    pandas = need("pandas", "InfluenceReport.to_pandas")
    report.column()  # raises where there is no query, and so no line
    rows, columns = tables.everything(report.scores)
    values: dict[str, Any] = tables.columns(report.scores, rows, columns)
    values |= _of_methods(report)
    values["query"] = pandas.Categorical.from_codes(columns, categories=list(report.queries))
    return pandas.DataFrame(values)


def to_polars(report: Contents) -> Any:
    """See :meth:`InfluenceReport.to_polars`."""
    return need("polars", "InfluenceReport.to_polars", "polars").from_arrow(to_arrow(report))


def to_dataset_column(report: Contents, query: str | None, name: str) -> pa.Array:
    """See :meth:`InfluenceReport.to_dataset_column`."""
    if name not in COLUMNS:
        raise ValueError(f"InfluenceReport.to_dataset_column: no column {name!r}; choose one of {', '.join(COLUMNS)}")
    which = np.full(report.rows, report.column(query))
    values = tables.columns(report.scores, np.arange(report.rows), which)[name]
    return doubles(values) if values.dtype == np.float64 else pa.array(values)


def export(report: Contents, path: Path, form: Format, query: str | None, q: float | None) -> Path:
    """See :meth:`InfluenceReport.export`."""
    return replace_file(path, contents(report, form, query, q, as_json=path.suffix == ".json"))


def contents(report: Contents, form: Format, query: str | None, q: float | None, as_json: bool = False) -> bytes:
    """What :meth:`InfluenceReport.export` writes; ``as_json`` chooses JSON for the lists of rows."""
    if form not in get_args(Format):
        raise ValueError(f"InfluenceReport.export: no format {form!r}; choose one of {', '.join(get_args(Format))}")
    if form in LISTS:
        rows = report.drop_list(q, query) if form == "drop-list" else report.keep_list(q, query)
        return _row_list(rows, as_json)
    if form == "markdown":
        return markdown(report, None if query is None else [query]).encode()
    table = to_arrow(report)
    if query is not None:
        table = table.slice(report.column(query) * report.rows, report.rows)
    writers: dict[str, Callable[[pa.Table], bytes]] = {"csv": _csv, "json": _json, "parquet": _parquet}
    return writers[form](table)


def _row_list(rows: NDArray[np.int64], as_json: bool) -> bytes:
    if as_json:
        return (json.dumps(rows.tolist()) + "\n").encode()
    return "".join(f"{line}\n" for line in ("row", *rows.tolist())).encode()


def _csv(table: pa.Table) -> bytes:
    """Names of queries without control characters: a CSV file is shown in terminals."""
    names = pa.array([plain(name) for name in table.column("query").to_pylist()], pa.string())
    file = BytesIO()
    pa_csv.write_csv(table.set_column(1, "query", names), file, pa_csv.WriteOptions(quoting_style="needed"))
    return file.getvalue()


def _json(table: pa.Table) -> bytes:
    """A list of objects, one a line."""
    return ("[\n" + ",\n".join(map(_json_line, table.to_pylist())) + "\n]\n").encode()


def _json_line(line: dict[str, Any]) -> str:
    try:
        return json.dumps(line, allow_nan=False)
    except ValueError:  # JSON has no infinity, so it is text, as in meta.json
        return json.dumps(jsonable(line, "scores"))


def _parquet(table: pa.Table) -> bytes:
    file = BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()
