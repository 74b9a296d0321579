"""Checks of scores, queries and row ids on their way into a report; every error names the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.scores import Attribution, Scores

MATRICES = ("mu", "se", "p", "q", "t", "p_t", "null_sd")


def checked(scores: Scores) -> Scores:
    """The scores as read-only float64 / int64 arrays.

    Raises:
        ValueError: On wrong shapes, repeated query names, a standard deviation below 0, or a score for a row that
            was never observed.
    """
    names = [query.name for query in scores.queries]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"InfluenceReport: queries are {names}; give at least one query, each with a name of its own")
    seen = readonly(np.asarray(scores.observations).astype(np.int64))
    n, q = seen.size, len(names)
    arrays: dict[str, Any] = {"observations": seen}
    shapes = dict.fromkeys(MATRICES, (n, q)) | {"mean_loss": (n,), "null_ks_p": (q,)}
    for name, shape in shapes.items():
        arrays[name] = readonly(np.asarray(getattr(scores, name), dtype=np.float64))
        if arrays[name].shape != shape:
            found = arrays[name].shape
            raise ValueError(f"InfluenceReport: scores.{name} has shape {found}, expected {shape} (rows, queries)")
    for name in ("se", "null_sd"):
        if bool((arrays[name] < 0).any()):
            raise ValueError(f"InfluenceReport: scores.{name} has a standard deviation below 0; NaN says unknown")
    arrays["null_mu"] = readonly(np.asarray(scores.null_mu, dtype=np.float64))
    if arrays["null_mu"].ndim != 2 or len(arrays["null_mu"]) != q:
        raise ValueError(f"InfluenceReport: scores.null_mu has shape {arrays['null_mu'].shape}, expected ({q}, draws)")
    if seen.ndim != 1 or bool((seen < 0).any()):
        raise ValueError("InfluenceReport: scores.observations must be one count >= 0 for every row")
    scored = np.flatnonzero((seen == 0) & ~np.isnan(arrays["mu"]).all(axis=1))
    if scored.size:
        raise ValueError(f"InfluenceReport: never observed rows have scores ({listed(scored)}); set their mu to NaN")
    return replace(scores, queries=tuple(scores.queries), **arrays)


def checked_attributions(found: Sequence[Attribution]) -> tuple[Attribution, ...]:
    """The attributions, of which no two have one method and one stage.

    Raises:
        ValueError: If two have, or something is none.
    """
    for each in found:
        if not isinstance(each, Attribution):
            raise ValueError(f"InfluenceReport: attributions hold {type(each).__name__}; give a list of Attribution")
    keys = [(each.method, each.at) for each in found]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"InfluenceReport: two attributions are by {twice[0]!r} at stage {twice[1]!r}; keep one")
    return tuple(found)


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
