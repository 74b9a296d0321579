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
from ine_callback.report.bands import Band
from ine_callback.report.neighbours import neighbours
from ine_callback.report.stored_vectors import StoredBlock, StoredVectors

THREADS = 2
STORES: dict[str, tuple[Band, ...]] = {
    "int8": (),
    "mixed, as of 1,600 rows": (Band(8, 617), Band(4, 636), Band(2, 332)),  # of the MLP with AdamW
    "mixed, as of a flat spectrum": (Band(2, 4080),),  # the most numbers
}


def asked(rows: int, queries: int, bands: tuple[Band, ...]) -> dict[str, Any]:
    """Seconds of the product of all rows with all queries, and of one row's neighbours, with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    rng, size = np.random.default_rng(0), sum(band.size for band in bands) or GradientStore(dtype="int8").dimensions
    dimensions = sum(band.count for band in bands) or size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.npy"
        written = np.lib.format.open_memmap(path, "w+", np.int8, (rows, size))
        for start in range(0, rows, 10**5):
            part = written[start : start + 10**5]
            part[:] = rng.integers(-127, 128, part.shape, dtype=np.int8)
        written.flush()
        stored = np.load(path, mmap_mode="r")
        block = StoredBlock(("w",), (dimensions,), np.arange(dimensions))
        eye, ones = np.eye(dimensions, dtype=np.float32), np.ones(dimensions, np.float32)
        scale = np.ones((rows, max(1, len(bands))), np.float32)
        store = StoredVectors(stored, scale, (block,), eye, ones, np.ones(rows, np.bool_), bands=bands)
        found: dict[str, Any] = {"rows": rows, "queries": queries, "numbers": dimensions, "bytes": path.stat().st_size}
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
