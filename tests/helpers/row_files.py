"""Files of rows for ``ine-callback kairos``: two classes, of which training row 7 has the wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

WRONG = 7


def row_arrays() -> dict[str, tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(130, 3))
    y = (x[:, 0] > 0).astype(int)
    x[:, 0] += 2 * np.sign(x[:, 0])
    y[WRONG] = 1 - y[WRONG]
    return {"train": (x[:80], y[:80]), "reference": (x[80:], y[80:])}


def save_row_files(folder: Path) -> None:
    """train and reference, each as .npz, .csv and .parquet with the columns a, b, c and y."""
    for name, (x, y) in row_arrays().items():
        np.savez(folder / f"{name}.npz", x=x, y=y)
        table = pa.table({"a": x[:, 0], "y": np.array(["no", "yes"])[y], "b": x[:, 1], "c": x[:, 2]})
        csv.write_csv(table, folder / f"{name}.csv")
        parquet.write_table(table, folder / f"{name}.parquet")
