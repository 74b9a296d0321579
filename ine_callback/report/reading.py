"""Reading a report's files as data from strangers: plain files only, of bounded size, and every fault is one error."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ine_callback.errors import InfluenceError
from ine_callback.report.files import find
from ine_callback.utilities.words import plain

REMEDY = "give the folder that InfluenceReport.save wrote, or save the report again"
QUERY = pa.dictionary(pa.int32(), pa.string())
# All that goes wrong in foreign data; whatever else is raised is a fault of ours.
FAULTS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)
MAX_JSON_BYTES = 2**25
MAX_JSON_DEPTH = 40
# A table may need this many bytes, or this many times its file's size: a million unobserved rows need 61 times theirs.
MIN_TABLE_MEMORY, MAX_MEMORY_RATIO = 2**29, 1000
MAX_MESSAGE = 600


class ReportError(InfluenceError):
    """A folder does not hold a readable report; the message names the folder, the fault and the remedy."""

    def __init__(self, folder: Path, fault: str, remedy: str = REMEDY) -> None:
        fault = plain(fault[:MAX_MESSAGE])  # it can hold foreign text
        super().__init__(f"InfluenceReport.load: {folder}: {fault}; {remedy}")


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """Whatever goes wrong in foreign data inside is a :class:`ReportError` that names the folder."""
    try:
        yield
    except ReportError:
        raise
    except FAULTS as error:
        raise ReportError(folder, str(error)) from error


def open_plain(folder: Path, name: str) -> BinaryIO:
    """A file of the report; a link, which could lead anywhere, and a pipe, which never ends, are refused."""
    path = find(folder, name)
    if path is None:
        raise ReportError(folder, f"{name} missing")
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ReportError(folder, f"{name} is a link, a folder or a pipe", "put the file itself there")
    return path.open("rb")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ReportError: When it is no JSON object, is too large or too deep, or holds text that is no Unicode.
    """
    with open_plain(folder, name) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ReportError(folder, f"{name} has more than {MAX_JSON_BYTES:,} bytes")
    try:
        found = json.loads(data.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise ReportError(folder, f"{name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ReportError(folder, f"{name} does not belong to a report (it is no object)")
    if _too_deep(found):
        raise ReportError(folder, f"{name} is nested more than {MAX_JSON_DEPTH} levels deep")
    return found


def read_format(folder: Path, name: str, kind: str, *versions: int) -> dict[str, Any]:
    """The object in a JSON file, whose ``format`` must be this and whose ``format_version`` one of these.

    Raises:
        ReportError: When they are not, or the file is no readable JSON object.
    """
    found = read_json(folder, name)
    if found.get("format") != kind or found.get("format_version") not in versions:
        raise ReportError(folder, f"{name}: its format is not {kind!r} {' or '.join(map(str, versions))}")
    return found


def _finite(text: str) -> float:
    """A number, as JSON has them: Python reads NaN, Infinity and 1e999 too."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def _too_deep(found: Any) -> bool:
    level = [found]
    for _ in range(MAX_JSON_DEPTH):
        nests = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        level = [part for nest in nests for part in nest]
    return bool(level)


def is_count(value: Any) -> bool:
    """Whether a JSON value is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a double can hold."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023)


def read_table(folder: Path, name: str, schema: pa.Schema, lines: int | None = None) -> pa.Table:
    """A Parquet file of this schema; queries may be encoded as text or as a dictionary.

    Args:
        folder: The report's folder.
        name: The file's name.
        schema: Columns, in any order, and their types; those that are no doubles must be without null.
        lines: How many there must be.

    Raises:
        ReportError: When the file is unreadable, too large when unpacked, or of another schema.
    """
    with open_plain(folder, name) as file:
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            found = [(field.name, field.type) for field in parquet.schema_arrow]
        except FAULTS as error:
            raise ReportError(folder, f"{name} is not a readable Parquet file ({error})") from error
        if not _fits(found, schema):
            expected = [(field.name, field.type) for field in schema]
            raise ReportError(folder, f"{name} has columns {_listed(found)}, expected {_listed(expected)}")
        _check_size(folder, name, parquet.metadata, os.fstat(file.fileno()).st_size)
        if lines is not None and parquet.metadata.num_rows != lines:
            raise ReportError(folder, f"{name} has {parquet.metadata.num_rows} lines, expected {lines}")
        try:
            table = parquet.read(use_threads=False)  # one unpacked page at a time
            table.validate(full=True)
        except FAULTS as error:
            raise ReportError(folder, f"{name} is damaged ({error})") from error
    for field in schema:
        if field.type != pa.float64() and table.column(field.name).null_count:
            raise ReportError(folder, f"{name}: column {field.name} has nulls")
    return table


def _fits(found: list[tuple[str, Any]], schema: pa.Schema) -> bool:
    texts = (pa.string(), pa.large_string(), QUERY)
    return sorted(name for name, _ in found) == sorted(schema.names) and all(
        kind == schema.field(name).type or (kind in texts and schema.field(name).type in texts) for name, kind in found
    )


def _check_size(folder: Path, name: str, facts: pq.FileMetaData, size: int) -> None:
    """Refuses what would need far more memory than a report of the file's size does."""
    groups = [facts.row_group(index) for index in range(facts.num_row_groups)]
    if facts.num_rows != sum(group.num_rows for group in groups) or facts.num_rows < 0:
        raise ReportError(folder, f"{name} is damaged (its number of lines contradicts itself)")
    claimed = sum(group.total_byte_size for group in groups)  # asking a damaged column kills the process (pyarrow 26)
    needed = max(claimed, 8 * facts.num_rows * facts.num_columns)
    if needed > max(MIN_TABLE_MEMORY, MAX_MEMORY_RATIO * size):
        raise ReportError(folder, f"{name} would unpack from {size:,} to {needed:,} bytes, which no report does")


def _listed(columns: list[tuple[str, Any]]) -> str:
    """Columns and their types as text, shortened."""
    text = ", ".join(f"{name}: {kind}" for name, kind in columns)
    return text if len(text) <= 250 else text[:250] + " …"
