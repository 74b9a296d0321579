"""Tables for ``ine-callback effects`` from files; effects with their rows as one Parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv, parquet

from ine_callback.effects.effect import Effect
from ine_callback.errors import InfluenceError

KEY = b"ine_callback.effects"


def read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Columns by name of a CSV or Parquet file.

    Raises:
        InfluenceError: If the file is of another kind, or damaged.
        OSError: If it cannot be opened.
    """
    kind = path.suffix.lower()
    if kind not in (".parquet", ".csv"):
        raise InfluenceError(f"effects: {path} is no .parquet or .csv file; save the table in one of these forms.")
    table = _read(path) if kind == ".parquet" else _csv(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def check_output(path: Path) -> None:
    """Refuses a file that :func:`save` should not write, before anything is estimated.

    Raises:
        InfluenceError: If it does not end in .parquet.
    """
    if path.suffix.lower() != ".parquet":
        raise InfluenceError(f"effects: {path} does not end in .parquet; name the output so.")


def save(effects: Sequence[Effect], path: Path) -> Path:
    """Writes effects of one table: a line for every row, with its influence and what leaving it out would add."""
    columns: dict[str, Any] = {"row": np.arange(len(effects[0].influence))}
    for each in effects:
        columns |= {f"{each.name}/influence": each.influence, f"{each.name}/removal": each.removal}
    words = json.dumps([each.to_dict() for each in effects])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns).replace_schema_metadata({KEY: words}), path)
    return path


def load(path: Path) -> list[Effect]:
    """Effects that :func:`save` wrote.

    Raises:
        InfluenceError: If the file holds none.
        OSError: If it cannot be opened.
    """
    table = _read(path)
    try:
        found = json.loads((table.schema.metadata or {})[KEY])
        return [_effect(words, table) for words in found]
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InfluenceError(f"effects: {path} holds no effects ({error}); write them by effects fit -o.") from None


def _effect(words: dict[str, Any], table: pa.Table) -> Effect:
    named = Effect.from_dict(words, np.zeros(table.num_rows)).name
    column = next(
        name for name in (named, words["estimand"]) if f"{name}/influence" in table.column_names
    )  # 0.2: short
    return Effect.from_dict(words, table[f"{column}/influence"].to_numpy())


def _read(path: Path) -> pa.Table:
    try:
        return parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise InfluenceError(f"effects: {path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _csv(path: Path) -> pa.Table:
    try:
        return csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise InfluenceError(f"effects: {path} is not a readable CSV file: {str(error).splitlines()[0]}") from None
