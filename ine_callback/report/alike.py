"""Rows that act alike, as findings beside label errors: in numbers for all views, and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.neighbours import duplicate_cosine, near_duplicates
from ine_callback.report.weak_groups import RATE, WeakGroup, on_data, weak_groups
from ine_callback.utilities.words import plain

if TYPE_CHECKING:
    from ine_callback.report.stored_vectors import StoredVectors
    from ine_callback.scores import Scores

MOST_ROWS = 20_000  # beyond, comparing all rows takes a minute, which no view of a report may take
MOST_LISTED = 8  # groups that the page shows
MOST_SHOWN = 24  # rows of each


@dataclass(frozen=True)
class Alike:
    """What a gradient store says of rows that act alike.

    Attributes:
        duplicates: Groups of near duplicates in gradient space, the largest first.
        weak: Weak groups, those that raise a query first.
        cosine: From which rows are near duplicates.
    """

    duplicates: list[NDArray[np.int64]]
    weak: list[WeakGroup]
    cosine: float


def find(store: StoredVectors | None, scores: Scores) -> Alike | None:
    """The findings; None without a store, and where there are too many rows to compare them for every view."""
    if store is None or len(store.seen) > MOST_ROWS:
        return None
    cosine = duplicate_cosine(store)
    return Alike(near_duplicates(store, cosine), weak_groups(store, scores, on_data(scores), RATE), round(cosine, 4))


def facts_of(store: StoredVectors | None, found: Alike | None) -> dict[str, Any] | None:
    """The findings as plain types for :meth:`InfluenceReport.summary`; None without a store."""
    if store is None:
        return None
    if found is None:
        return {"near_duplicates": None, "weak_groups": None, "cosine": None}
    groups = [
        {"query": one.query, "rows": one.rows.tolist(), "mu": one.mu, "t": one.t, "q": one.q} for one in found.weak
    ]
    return {
        "near_duplicates": [rows.tolist() for rows in found.duplicates],
        "weak_groups": groups,
        "cosine": found.cosine,
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The findings in words; none without a store.

    Example:
        >>> lines({"alike": {"near_duplicates": [[3, 17], [4, 5, 6]], "weak_groups": [], "cosine": 0.8}})[0]
        'Near duplicates: report.near_duplicates() lists 5 rows in 2 groups (cosine ≥ 0.80 in gradient space).'
    """
    found = facts["alike"]
    if found is None:
        return []
    if found["weak_groups"] is None:
        return [
            f"Rows that act alike are not looked for in more than {MOST_ROWS:,} rows: report.near_duplicates(), "
            "report.weak_groups()."
        ]
    groups, weak = found["near_duplicates"], found["weak_groups"]
    space = f"cosine ≥ {found['cosine']:.2f} in gradient space"
    rows = f"{sum(map(len, groups)):,} rows in {_count(len(groups), 'group')}"
    duplicates = f"report.near_duplicates() lists {rows} ({space})." if groups else f"none ({space})."
    parts = [f"{len(one['rows'])} rows {verb(one['mu'])} {plain(one['query'])!r}, q {one['q']:.2g}" for one in weak[:3]]
    told = "; ".join(parts) + ("; …" if len(weak) > 3 else "")
    together = "rows that move a query together, none of them flagged alone"
    raising = sum(one["mu"] < 0 for one in weak)
    sides = f"{raising:,} raise it, {len(weak) - raising:,} lower it"
    listed = f"report.weak_groups() lists {_count(len(weak), 'group')} of {together} ({sides}): {told}."
    none = f"no group of {together}, at a false discovery rate of {RATE:g}."
    return [f"Near duplicates: {duplicates}", f"Weak groups: {listed if weak else none}"]


def rows_of(found: Alike | None) -> list[int]:
    """The rows that the page names."""
    if found is None:
        return []
    groups = [*found.duplicates[:MOST_LISTED], *(one.rows for one in found.weak[:MOST_LISTED])]
    return [row for rows in groups for row in rows[:MOST_SHOWN].tolist()]


def section(found: Alike) -> dict[str, Any]:
    """The page's section: groups with their rows, and how many of each are left out."""
    duplicates, weak = found.duplicates, found.weak
    return {
        "cosine": found.cosine,
        "rate": RATE,
        "duplicates": [_cut(rows) for rows in duplicates[:MOST_LISTED]],
        "weak": [{"one": one, "verb": verb(one.mu)} | _cut(one.rows) for one in weak[:MOST_LISTED]],
        "more": [max(0, len(duplicates) - MOST_LISTED), max(0, len(weak) - MOST_LISTED)],
    }


def _cut(rows: NDArray[np.int64]) -> dict[str, Any]:
    return {"size": len(rows), "rows": rows[:MOST_SHOWN].tolist(), "left": max(0, len(rows) - MOST_SHOWN)}


def verb(mu: float) -> str:
    """What rows with such a sum of scores do to a query."""
    return "lower" if mu > 0 else "raise"


def short(facts: dict[str, Any]) -> str:
    """The findings at a glance."""
    found = facts["alike"]
    if found["weak_groups"] is None:
        return "Not looked for"
    rows = sum(map(len, found["near_duplicates"]))
    return f"{_count(rows, 'near duplicate')} · {_count(len(found['weak_groups']), 'weak group')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
