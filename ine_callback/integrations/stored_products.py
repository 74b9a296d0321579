"""Scores of many stored rows on many queries, by blocks of rows that fit into a cache or a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from ine_callback.report.bands import unpacked
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Floats

CACHED, ON_DEVICE = 2**9, 2**16  # rows of a block


def products(store: StoredVectors, queries: Floats, device: torch.device) -> Floats:
    """What :meth:`.StoredVectors.products` gives, by torch's threads or on a device, where rows are widened.

    Rows are read from disk once, block by block. On a processor each thread has blocks of its own: threads that share
    one wait for each other longer than they work.

    Args:
        store: The run's.
        queries: Numbers [Q, k].
        device: Where the products are taken.

    Returns:
        Scores [N, Q] without a unit.

    Example:
        >>> rows = np.array([[1, 2], [-3, 0]], dtype=np.int8)
        >>> ones = np.ones(2, dtype=np.float32)
        >>> store = StoredVectors(rows, 2 * ones, (), np.eye(2, dtype=np.float32), ones, np.ones(2, dtype=np.bool_))
        >>> products(store, np.array([[1.0, 1.0]]), torch.device("cpu"))
        array([[ 6.],
               [-6.]])
    """
    factors = torch.as_tensor(store.factors(queries), device=device)
    scales = torch.from_numpy(np.array(store.scales))
    out = torch.empty(len(store.rows), len(queries), dtype=torch.float64)
    size = CACHED if device.type == "cpu" else ON_DEVICE

    def fill(first: int, step: int) -> None:
        memory = torch.empty(min(size, len(out)), len(factors), device=device)  # new one costs more than to fill it
        for start in range(first, len(out), step):
            rows = slice(start, start + size)
            part = torch.from_numpy(np.array(store.rows[rows])).to(device)  # a copy: the file is read-only
            numbers, each = memory[: len(part)], scales[rows].to(device)
            if store.bands:
                unpacked(part, each, store.bands, numbers)
            else:
                torch.mul(part, each, out=numbers)
            out[rows] = (numbers @ factors).cpu()

    with _one_thread_each() as threads:
        workers = threads if device.type == "cpu" else 1
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(0, workers * size, size), [workers * size] * workers))
    return out.numpy()


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Torch's operations have one thread each; gives how many they had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
