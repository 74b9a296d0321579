"""Checks of scores on their way into a report; every error names the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ine_callback.scores import WINDOWS, Attribution, Scores
from ine_callback.utilities.validate import listed, readonly

MATRICES = ("mu", "se", "p", "q", "t", "p_t", "null_sd")


def checked(scores: Scores) -> Scores:
    """The scores as read-only float64 / int64 arrays.

    Raises:
        ValueError: On wrong shapes, repeated query names, a standard deviation below 0, or a score for a row that
            was never observed.
    """
    names = [query.name for query in scores.queries]
    if len(set(names)) < len(names):
        raise ValueError(f"InfluenceReport: queries are {names}; give each its own name")
    if estimands := [query.name for query in scores.queries if query.kind == "estimand"]:
        raise ValueError(
            f"InfluenceReport: scores ask {estimands[0]!r}, an estimand, for which no row helps or harms; return it as "
            "an Attribution"
        )
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
    if scores.margins is not None:
        arrays["margins"] = readonly(np.asarray(scores.margins, dtype=np.float64))
        if arrays["margins"].shape != (n, WINDOWS):
            found = arrays["margins"].shape
            raise ValueError(f"InfluenceReport: scores.margins has shape {found}, expected {(n, WINDOWS)}")
    for name in ("unit", "query_loss"):
        if (value := getattr(scores, name)) is not None:
            found = np.asarray(value, dtype=np.float64)
            if found.shape != (q,):
                raise ValueError(f"InfluenceReport: scores.{name} has shape {found.shape}, expected ({q},)")
            if name == "unit" and bool((found <= 0).any()):
                raise ValueError("InfluenceReport: scores.unit is not above 0; NaN says unknown")
            known = np.isfinite(found)
            arrays[name] = readonly(np.where(known, found, np.nan)) if known.any() else None
    arrays["null_mu"] = readonly(np.asarray(scores.null_mu, dtype=np.float64))
    if arrays["null_mu"].ndim != 2 or len(arrays["null_mu"]) != q:
        raise ValueError(f"InfluenceReport: scores.null_mu has shape {arrays['null_mu'].shape}, expected ({q}, draws)")
    if seen.ndim != 1 or bool((seen < 0).any()):
        raise ValueError("InfluenceReport: scores.observations must be one count >= 0 for every row")
    scored = np.flatnonzero((seen == 0) & ~np.isnan(arrays["mu"]).all(axis=1))
    if scored.size:
        raise ValueError(f"InfluenceReport: never observed rows have scores ({listed(scored)}); set their mu to NaN")
    return replace(scores, queries=tuple(scores.queries), **arrays)


def no_query(query: str, queries: Sequence[str], attributions: Sequence[Attribution]) -> Exception:
    """What to raise for a name that is no query of f-INE's: estimands are refused wherever rows help or harm."""
    if any(info.name == query and info.kind == "estimand" for each in attributions for info in each.queries):
        return ValueError(
            f"InfluenceReport: {query!r} is an estimand: its rows raise or lower an estimate, and neither help nor "
            f"harm training, so nothing is dropped, weighted or suspected by it; read report.effects[{query!r}]"
        )
    return KeyError(f"InfluenceReport: no query {query!r}; choose one of {', '.join(map(repr, queries))}")


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
