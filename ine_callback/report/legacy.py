"""Reports as they were while they knew one fit-end method by name (until 0.1): its files, and its attributes.

``bif.json`` and its Parquet files are read, and ``report.bif`` stays; nothing new is written in this form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ine_callback.report.attribution_store import number, part_fault
from ine_callback.report.files import find
from ine_callback.report.reading import FAULTS, ReportError, is_count, is_number, read_format, read_table
from ine_callback.scores import Attribution, Check, QueryInfo, TokenScores

METHOD = "BIF"
FORMAT, VERSION = "ine_callback.bif", 2
FILES = SCORES, TERMS, META = "bif.parquet", "bif_terms.parquet", "bif.json"
MATRICES = ("scores", "se", "p", "q", "plain", "plain_se", "laplace", "trend", "size")
OF_TERMS = ("scores", "se", "q")
FIELDS = {
    "at": (int, str), "rows": int, "terms": int, "queries": list, "query_sd": list, "loss": list, "screens": list,
    "settings": dict, "notes": list, "interrupted": bool,
}  # fmt: skip
SHOWN = ("step_size", "n_beta", "localization")  # settings that the headline formats as numbers


class FormerNames(ABC):
    """Names of a report's attributions by BIF, for code written for earlier versions."""

    @abstractmethod
    def attribution(self, method: str) -> Attribution | None: ...

    @abstractmethod
    def stages(self, method: str) -> tuple[Attribution, ...]: ...

    @property
    def bif(self) -> Attribution | None:
        """The same as ``attribution("BIF")``: Bayesian influence at the last stage at which chains ran."""
        return self.attribution(METHOD)

    @property
    def bif_stages(self) -> tuple[Attribution, ...]:
        """The same as ``stages("BIF")``."""
        return self.stages(METHOD)


def _schema(integers: Sequence[str], numbers: Sequence[str]) -> pa.Schema:
    kinds = {"at": pa.string()} | dict.fromkeys(integers, pa.int64()) | {"query": pa.string()}
    return pa.schema(kinds | dict.fromkeys(numbers, pa.float64()))


SCORES_SCHEMA = _schema(("row",), (*MATRICES, "row_sd"))
TERMS_SCHEMA = _schema(("row", "term"), OF_TERMS)


def load(folder: Path) -> tuple[Attribution, ...]:
    """The chains of each stage; empty where there are none.

    Raises:
        ReportError: When the files are damaged or do not belong together.
    """
    if find(folder, META) is None:
        return ()
    meta = read_format(folder, META, FORMAT, VERSION)
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
        raise ReportError(folder, f"{META} or a Parquet file of its chains is damaged ({error})") from error


def _fault(stages: Any) -> str:
    """Why a JSON value does not describe stages of chains; empty if it does."""
    if not isinstance(stages, list) or not stages:
        return "stages is not a list of stages"
    for stage in stages:
        if fault := part_fault(stage, FIELDS, "a stage", "screens"):
            return fault
        if not is_count(stage["rows"]) or not is_count(stage["terms"]) or not stage["rows"]:
            return f"a stage has {stage['rows']!r} rows and {stage['terms']!r} terms"
        if not all(isinstance(note, str) for note in stage["notes"]):
            return "notes holds something that is no text"
        if not all(is_number(stage["settings"].get(name, 0)) for name in SHOWN):
            return f"one of the settings {', '.join(SHOWN)} is no number"
    return "two stages have one name" if len({stage["at"] for stage in stages}) < len(stages) else ""


def _parts(folder: Path, name: str, schema: pa.Schema, metas: list[Any], each: list[int]) -> dict[int | str, pa.Table]:
    """The lines of each stage, one query after the other; ``each`` is the number of lines per query."""
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


def _built(meta: dict[str, Any], table: pa.Table, of_terms: pa.Table | None) -> Attribution:
    queries = tuple(QueryInfo(**query) for query in meta["queries"])
    shape = (len(queries), meta["rows"])
    found = {name: _column(table, name).reshape(shape).T for name in (*MATRICES, "row_sd")}
    rows, tokens = _rows(table, (*shape, 1)), None
    if of_terms is not None:
        cube = (*shape, meta["terms"])
        if not np.array_equal(_rows(of_terms, cube), rows):
            raise ValueError("scores of terms are of other rows")
        flat = (_column(of_terms, name).reshape(len(queries), -1).T for name in OF_TERMS)
        tokens = TokenScores(np.arange(meta["rows"] + 1) * meta["terms"], *flat)
    row_sd, query_sd = found.pop("row_sd")[:, 0], _array(meta["query_sd"], len(queries))
    loss, settings = _array(meta["loss"], -1, len(meta["loss"][0])), meta["settings"]
    chains, draws = loss.shape
    scale = row_sd[:, None] * query_sd
    with np.errstate(all="ignore"):
        correlation = {"correlation": found["scores"] / scale, "correlation_se": found["se"] / scale}
    drifting = np.abs(found["trend"]) > np.fmax(0.3 * np.abs(found["plain"]), 2 * found["plain_se"])
    return Attribution(
        METHOD,
        rows,
        queries,
        found["scores"],
        found["se"],
        found["p"],
        found["q"],
        columns={name: found[name] for name in ("plain", "plain_se", "laplace", "trend")}
        | {"effective_draws": found["size"], **correlation},
        ranked_by="correlation" if settings.get("normalized") else "",
        doubtful=drifting | (found["size"] < 50),
        tokens=tokens,
        checks=tuple(Check(**(screen | {"value": number(screen["value"])})) for screen in meta["screens"]),
        settings=settings,
        arrays={"row_sd": row_sd, "query_sd": query_sd, "loss": loss},
        notes=tuple(meta["notes"]),
        title="Bayesian influence",
        headline=f"{chains} chains x {draws} draws · {meta['rows']:,} rows",
        at=meta["at"],
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
    """A JSON list of numbers, nested or not, as an array."""
    found = np.array([number(value) for value in np.ravel(np.array(values, dtype=object))], dtype=np.float64)
    return found.reshape(shape)
