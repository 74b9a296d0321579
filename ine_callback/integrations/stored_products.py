"""Scores of many stored rows on many queries, by blocks of rows that fit into a cache or a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ine_callback.report.bands import summed
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Floats

CACHED, ON_DEVICE = 2**10, 2**16  # rows of a block


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
    factors, added = (torch.as_tensor(each, device=device) for each in store.factors(queries))
    scales = torch.from_numpy(np.array(store.scales))
    out = torch.empty(len(store.rows), len(queries), dtype=torch.float64)
    size = CACHED if device.type == "cpu" else ON_DEVICE

    def fill(start: int) -> None:
        rows = slice(start, start + size)
        part = torch.from_numpy(np.array(store.rows[rows])).to(device)  # a copy: the file is read-only
        out[rows] = summed(part, scales[rows].to(device), factors, added, store.bands, Tensor.float).cpu()

    with _one_thread_each() as workers, ThreadPoolExecutor(workers if device.type == "cpu" else 1) as pool:
        list(pool.map(fill, range(0, len(store.rows), size)))
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
