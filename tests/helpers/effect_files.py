"""Files for ``ine-callback effects``: a table of treatment A, mediator M, outcome Y and a colour C, and its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

GRAPH = "C -> A; C -> M; C -> Y; A -> M -> Y; A -> Y"


def effect_columns() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    c = rng.choice(["red", "green", "blue"], 600)
    a = rng.random(600) < np.where(c == "red", 0.6, 0.4)
    m = a + rng.normal(size=600)
    return {"C": c, "A": a, "M": m, "Y": a + m + (c == "red") + rng.normal(size=600)}


def save_effect_files(folder: Path) -> None:
    """table.csv, table.parquet and graph.txt."""
    table = pa.table(effect_columns())
    csv.write_csv(table, folder / "table.csv")
    parquet.write_table(table, folder / "table.parquet")
    (folder / "graph.txt").write_text(GRAPH.replace("; ", "\n"), encoding="utf-8")
