"""How long a large store takes to answer: numbers drawn at random, read from disk."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ine_callback import GradientStore
from ine_callback.integrations.stored_products import products
from ine_callback.report.neighbours import neighbours
from ine_callback.report.stored_vectors import StoredBlock, StoredVectors

THREADS = 2


def asked(rows: int, queries: int) -> dict[str, Any]:
    """Seconds of the product of all rows with all queries, and of one row's neighbours, with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    dimensions, rng = GradientStore().dimensions, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.npy"
        written = np.lib.format.open_memmap(path, "w+", np.int8, (rows, dimensions))
        for start in range(0, rows, 10**5):
            part = written[start : start + 10**5]
            part[:] = rng.integers(-127, 128, part.shape, dtype=np.int8)
        written.flush()
        stored = np.load(path, mmap_mode="r")
        block = StoredBlock(("w",), (dimensions,), np.arange(dimensions))
        eye, ones = np.eye(dimensions, dtype=np.float32), np.ones(dimensions, np.float32)
        store = StoredVectors(stored, np.ones(rows, np.float32), (block,), eye, ones, np.ones(rows, np.bool_))
        found: dict[str, Any] = {"rows": rows, "queries": queries, "bytes": path.stat().st_size}
        for name, ask in (
            ("ask", lambda: products(store, rng.normal(size=(queries, dimensions)), torch.device("cpu"))),
            ("NumPy", lambda: store.products(rng.normal(size=(queries, dimensions)))),
            ("neighbours", lambda: neighbours(store, 0)),
        ):
            started, used = time.monotonic(), time.process_time()
            ask()
            found[f"{name} seconds"] = time.monotonic() - started
            found[f"{name} CPU seconds"] = time.process_time() - used
    torch.set_num_threads(before)
    return found | {"threads": THREADS}
