"""Rows for ``ine-callback kairos`` from files, and their values into files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv, parquet

from ine_callback.errors import InfluenceError
from ine_callback.methods.kairos.settings import NAME
from ine_callback.scores import Attribution


def read_rows(path: Path, label: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Features [n, ...] and labels [n] of a file; None for labels where it has none.

    Args:
        path: ``.npz`` with an array ``x``, or ``.parquet`` or ``.csv``, whose columns but one are features.
        label: Name of the array or column of labels.

    Raises:
        InfluenceError: If the file is of another kind, damaged, or has no features.
        OSError: If it cannot be opened.
    """
    kind = path.suffix.lower()
    if kind == ".npz":
        return _arrays(path, label)
    if kind not in (".parquet", ".csv"):
        raise InfluenceError(f"{NAME}: {path} is no .npz, .parquet or .csv file; save rows in one of these forms.")
    try:
        table = parquet.read_table(path) if kind == ".parquet" else csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise InfluenceError(f"{NAME}: {path} is not a readable {kind} file: {str(error).splitlines()[0]}") from None
    names = [name for name in table.column_names if name != label]
    kinds = {name: table.schema.field(name).type for name in names}
    other = [f"{n} ({t})" for n, t in kinds.items() if not (pa.types.is_integer(t) or pa.types.is_floating(t))]
    if other or not names:
        what = f"columns that are no numbers: {', '.join(other[:5])}" if other else "no columns of features"
        raise InfluenceError(f"{NAME}: {path} has {what}; encode or drop them, or name the labels with --label.")
    x = np.stack([table[name].to_numpy().astype(np.float64) for name in names], 1)
    return x, np.array(table[label].to_pylist()) if label in table.column_names else None


def _arrays(path: Path, label: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    try:
        with np.load(path) as found:
            if "x" not in found:
                raise InfluenceError(f"{NAME}: {path} has the arrays {found.files}, and features must be called 'x'.")
            return found["x"], found.get(label)
    except (zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, InfluenceError):
            raise
        raise InfluenceError(f"{NAME}: {path} is not a readable .npz file of plain arrays: {error}") from None


def check_output(path: Path) -> None:
    """Refuses a file that :func:`write_values` could not write, before the values are computed.

    Raises:
        InfluenceError: If it ends in neither .csv nor .parquet.
    """
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise InfluenceError(f"{NAME}: {path} ends in neither .csv nor .parquet; name the output with one of them.")


def write_values(found: Attribution, path: Path) -> Path:
    """Writes a line for every row, as CSV or Parquet by the ending of ``path``."""
    table = pa.table({"row": found.rows, "value": found.scores[:, 0]} | {k: v[:, 0] for k, v in found.columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    (parquet.write_table if path.suffix.lower() == ".parquet" else csv.write_csv)(table, path)
    return path
