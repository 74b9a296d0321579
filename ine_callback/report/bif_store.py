"""BIF's part of a report on disk: one Parquet file of scores, one JSON file of settings and screens. Data only.

bif.parquet   one line for every query and row
bif.json      queries, settings, screens, the chains' trace; written last, so that a folder without it holds no chains
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ine_callback.bif.scores import BIFScores, Screen
from ine_callback.report.runinfo import jsonable
from ine_callback.report.store import ReportError
from ine_callback.scores import QueryInfo

SCORES, META, FORMAT, VERSION = "bif.parquet", "bif.json", "ine_callback.bif", 1
MATRICES = ("scores", "se", "p", "q", "plain", "plain_se", "laplace")


def save(found: BIFScores | None, folder: Path) -> None:
    """Writes both files; without chains it removes those of a former report."""
    (folder / META).unlink(missing_ok=True)
    if found is None:
        (folder / SCORES).unlink(missing_ok=True)
        return
    rows, queries = found.scores.shape
    columns: dict[str, Any] = {
        "row": pa.array(np.tile(found.rows, queries)),
        "query": pa.array(np.repeat([query.name for query in found.queries], rows).tolist(), pa.string()),
    }
    for name in MATRICES:
        columns[name] = pa.array(getattr(found, name).T.ravel(), pa.float64(), from_pandas=True)
    columns["row_sd"] = pa.array(np.tile(found.row_sd, queries), pa.float64(), from_pandas=True)
    pq.write_table(pa.table(columns), folder / SCORES, compression="zstd", write_page_checksum=True)
    meta = {
        "format": FORMAT,
        "format_version": VERSION,
        "queries": [vars(query) for query in found.queries],
        "query_sd": found.query_sd,
        "loss": found.loss,
        "screens": [vars(screen) for screen in found.screens],
        "settings": found.settings,
        "notes": found.notes,
    }
    text = json.dumps(jsonable(meta, "bif"), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / META).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> BIFScores | None:
    """Reads what :func:`save` wrote; None where there are no chains.

    Raises:
        ReportError: When the files are damaged or do not belong together.
    """
    if not (folder / META).is_file():
        return None
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT or meta.get("format_version") != VERSION:
            raise ValueError(f"its format is not {FORMAT!r} {VERSION}")
        queries = tuple(QueryInfo(**query) for query in meta["queries"])
        table = pq.ParquetFile(folder / SCORES, page_checksum_verification=True).read()
        names = np.repeat([query.name for query in queries], table.num_rows // len(queries)).tolist()
        if table.column("query").to_pylist() != names:
            raise ValueError(f"{SCORES} and {META} name different queries")
        return _built(meta, queries, table)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OSError, pa.ArrowException) as error:
        raise ReportError(folder, f"{META} or {SCORES} is damaged ({error})") from error


def _built(meta: dict[str, Any], queries: tuple[QueryInfo, ...], table: pa.Table) -> BIFScores:
    def column(name: str) -> NDArray[np.float64]:
        return np.asarray(table.column(name).to_numpy(), dtype=np.float64).reshape(len(queries), -1)  # null becomes NaN

    screens = [Screen(**(screen | {"value": _number(screen["value"])})) for screen in meta["screens"]]
    return BIFScores(
        rows=np.asarray(table.column("row").to_numpy(), dtype=np.int64).reshape(len(queries), -1)[0],
        queries=queries,
        row_sd=column("row_sd")[0],
        query_sd=np.array([_number(value) for value in meta["query_sd"]]),
        loss=np.array(meta["loss"], dtype=np.float64),
        screens=tuple(screens),
        settings=meta["settings"],
        notes=tuple(meta["notes"]),
        **{name: column(name).T for name in MATRICES},
    )


def _number(value: Any) -> float:
    """JSON has neither NaN (null) nor infinity (text)."""
    return float("nan") if value is None else float(value)
