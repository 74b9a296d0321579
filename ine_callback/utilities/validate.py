"""Checks of row ids and thresholds; every error names the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def row_ids(rows: Iterable[int] | NDArray[Any], total: int, who: str) -> NDArray[np.int64]:
    """Dataset indices as an array.

    Raises:
        ValueError: When ``rows`` is not a flat collection of integers, is empty, or has duplicates.
        KeyError: When a row does not exist (negative ids do not count from the end).
    """
    ids = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
    if ids.size == 0:
        raise ValueError(f"{who}: no rows given; name at least one")
    if ids.dtype == bool:
        raise ValueError(f"{who}: got a boolean mask; pass np.flatnonzero(mask)")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{who}: rows must be a flat list of dataset indices, got {ids.dtype} of shape {ids.shape}")
    outside = ids[(ids < 0) | (ids >= total)]
    if outside.size:
        raise KeyError(f"{who}: no row {listed(outside)}; the report has rows 0 to {total - 1}")
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size < ids.size:
        raise ValueError(f"{who}: row {listed(unique[counts > 1])} given more than once; pass each row once")
    return ids.astype(np.int64)


def threshold(q: float, who: str) -> float:
    """A q-value threshold within [0, 1]."""
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"{who}: q is {q}; give a false discovery rate between 0 and 1, such as 0.05")
    return q


def listed(rows: NDArray[Any], limit: int = 5) -> str:
    """A few row ids as text.

    Example:
        >>> listed(np.arange(7))
        '0, 1, 2, 3, 4 and 2 more'
    """
    text = ", ".join(map(str, rows[:limit].tolist()))
    return text if rows.size <= limit else f"{text} and {rows.size - limit} more"


def readonly(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view
