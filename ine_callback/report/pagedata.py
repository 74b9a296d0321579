"""The numbers that the report's page draws, lists and sorts, as compact JSON that cannot leave its element."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.applications.group import group_score
from ine_callback.report.attribution_view import by_method
from ine_callback.report.neighbours import nearest
from ine_callback.report.plots import densities, heights
from ine_callback.report.rows import smallest
from ine_callback.report.stages import common, comparable, label
from ine_callback.stats.ranks import spearman
from ine_callback.utilities.words import decimals, null_check, plain, tails

if TYPE_CHECKING:
    from ine_callback.report.contents import Contents
    from ine_callback.scores import Attribution

MAX_PAIRS, MIN_ROWS = 200_000, 2_000  # pairs of row and query in the page, and rows that it has at least
ROWS_PER_END = 40  # of a query, always in the page
NEIGHBOURS, MOST_NEIGHBOURED = 6, 5_000  # nearest rows of a row in the page, and rows that have them
PRODUCTS = 5e10  # of two numbers, at most, for them: some seconds
MAX_VALUE = 1e30  # within float32's range; only damaged files have larger values
MAX_CURVES, CURVE_POINTS = 12, 41  # trade-off curves, and points of each
STAGE_ROWS_PER_END = 3  # rows drawn over the stages of training
Classes = tuple[list[str], NDArray[np.int64]]


def listed_rows(report: Contents, columns: Sequence[int]) -> NDArray[np.int64]:
    """The rows [n] that the page holds: all, or of many the ends, small q-values and a sample of the rest."""
    budget = max(MIN_ROWS, MAX_PAIRS // max(len(columns), 1))
    if report.rows <= budget:
        return np.arange(report.rows)
    scores, which = report.scores, list(columns)
    mu = np.nan_to_num(scores.mu[:, which], nan=0.0)
    urgent = np.nan_to_num(scores.q[:, which], nan=1.0).min(1, initial=1.0)
    ends = np.concatenate([smallest(side, ROWS_PER_END) for side in (*mu.T, *-mu.T)])
    urgent[ends] = -1.0
    rest = urgent > 0.05
    urgent[rest] = 1.0 + np.random.default_rng(0).random(int(rest.sum()))
    return np.sort(smallest(urgent, budget))


@dataclass(frozen=True)
class PageNeighbours:
    """The nearest rows of some of the page's rows, in gradient space.

    Attributes:
        rows: Those that have them [n], the extreme rows first.
        nearest: Their neighbours [n, k].
        cosines: Theirs [n, k].
        note: What a row without neighbours in the page is told.
    """

    rows: NDArray[np.int64]
    nearest: NDArray[np.int64]
    cosines: NDArray[np.float64]
    note: str

    def of(self, rows: Sequence[int]) -> list[int]:
        """Neighbours of some rows, those of the first ones first."""
        place = {row: k for k, row in enumerate(self.rows.tolist())}
        return [one for row in rows if row in place for one in self.nearest[place[row]].tolist()]

    def packed(self) -> dict[str, Any]:
        """For the page's script."""
        arrays = {"rows": _ints(self.rows), "nearest": _ints(self.nearest), "cosines": _floats(self.cosines)}
        return arrays | {"each": self.nearest.shape[1], "note": self.note}


def neighbours_of(report: Contents, names: Sequence[str]) -> PageNeighbours | None:
    """Neighbours of rows that the page holds, as many as its size and some seconds allow; None without a store."""
    store = report.store
    if store is None or not report.queries or store.seen.sum() < 2:
        return None
    first = [report.drop_list()]
    for name in names:
        first += [report.top(ROWS_PER_END, name).rows, report.bottom(ROWS_PER_END, name).rows]
    rows = np.concatenate([*first, listed_rows(report, [report.column(name) for name in names])])
    rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    rows = rows[store.seen[rows]]
    most = min(MOST_NEIGHBOURED, max(1, int(PRODUCTS / (len(store.seen) * store.dimensions))))
    note = "It was never observed, so it has no neighbours."
    if len(rows) > most:
        note = (
            f"Neighbours of {most:,} rows are in this file, of this one not: report.neighbours(row) has those of any."
        )
        rows = rows[:most]
    return PageNeighbours(rows, *nearest(store, rows, NEIGHBOURS), note)


def payload(
    report: Contents,
    facts: dict[str, Any],
    names: Sequence[str],
    classes: Classes | None,
    neighbours: PageNeighbours | None = None,
) -> dict[str, Any]:
    """All that the page's script reads; texts without control characters, arrays as base64 of little-endian bytes."""
    columns = [report.column(name) for name in names]
    rows = listed_rows(report, columns)
    first = names.index(facts["recommended_query"]) if facts["recommended_query"] in names else 0
    return {
        "total": report.rows,
        "flag": facts["flagged_at_q"],
        "rows": _ints(rows),
        "seen": _ints(report.observations[rows]),
        "loss": _floats(report.scores.mean_loss[rows]),
        "classes": None if classes is None else {"names": classes[0], "of": _ints(classes[1][rows])},
        "first": first,
        "methods": [plain(method) for method in by_method(report.attributions)],
        "neighbours": None if neighbours is None else neighbours.packed(),
        "queries": [_query(report, facts["queries"][column], column, rows, classes) for column in columns],
    }


def encoded(data: Any) -> str:
    """JSON for a ``<script type="application/json">``: no letter in it can end the element.

    Example:
        >>> "<" in encoded("</script>"), json.loads(encoded("</script>"))
        (False, '</script>')
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and the like are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _query(
    report: Contents, facts: dict[str, Any], column: int, rows: NDArray[np.int64], classes: Classes | None
) -> dict[str, Any]:
    scores, ends = report.scores, tails(facts["kind"])
    mu, found = scores.mu[:, column], densities(report, column)
    check = facts["null_ks_p"]
    return {
        "name": plain(facts["name"]),
        "question": plain(facts["question"]),
        **{name: getattr(ends, name) for name in ("upper", "lower", "high", "low", "suspect", "axis")},
        "positive": facts["helpful"],
        "negative": facts["harmful"],
        "check": null_check(float("nan") if check is None else check),
        "places": decimals(mu),
        "mu": _floats(mu[rows]),
        "se": _floats(scores.se[rows, column]),
        "height": _floats(heights(scores.q[:, column])[rows]),
        "null": {
            **{name: _floats(getattr(found, name)) for name in ("edges", "null", "rows")},
            "floor": found.floor,
            "draws": found.draws,
        },
        "groups": None if classes is None else _groups(report, column, *classes),
        "methods": [_method(report, stages, facts["name"], rows) for stages in by_method(report.attributions).values()],
    }


def _groups(report: Contents, column: int, names: list[str], which: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The rows of each of the largest classes as one set, with its trade-off curve."""
    scored = np.isfinite(report.scores.mu[:, column])
    sizes = np.bincount(which[scored], minlength=len(names))
    lines = []
    for index in np.argsort(-sizes, kind="stable")[:MAX_CURVES].tolist():
        if not sizes[index]:
            continue
        one = group_score(report.scores, np.flatnonzero(scored & (which == index)), column)
        mean = min(max(one.mu / one.size, -MAX_VALUE), MAX_VALUE)
        if np.isfinite([one.mu, one.z]).all():
            z = min(max(one.z, -MAX_VALUE), MAX_VALUE)
            lines.append({"name": names[index], "size": one.size, "mean": mean, "z": z, "curve": _curve(one.mu)})
    return lines


def _curve(mu: float) -> str:
    from ine_callback.stats.tradeoff import tradeoff

    return _floats(tradeoff(mu, np.linspace(0.0, 1.0, CURVE_POINTS)))


def _method(
    report: Contents, stages: Sequence[Attribution], query: str, rows: NDArray[np.int64]
) -> dict[str, Any] | None:
    """A method's scores of the page's rows and their course over its stages; None where it lacks the query."""
    found = stages[-1]
    if query not in [info.name for info in found.queries]:
        return None
    column, score = found.column(query), np.full(len(rows), np.nan)
    _, here, there = np.intersect1d(rows, found.rows, return_indices=True)
    score[here] = found.ranking[there, column]
    mu = report.scores.mu[rows, report.column(query)]
    both = np.isfinite(score) & np.isfinite(mu)
    rank = float(spearman(mu[both], score[both])) if both.sum() > 2 else float("nan")
    return {
        "name": plain(found.method),
        "scores": _floats(score),
        "agreement": f"rank agreement {rank:.2f}" if np.isfinite(rank) else "",
        "course": _course(stages, query),
    }


def _course(stages: Sequence[Attribution], query: str) -> dict[str, Any] | None:
    """The rows that are most extreme at the last stage, over all stages; as ``report.plot.stages``."""
    known = all(query in [info.name for info in stage.queries] for stage in stages)
    if len(stages) < 2 or not known:
        return None
    rows, score, _ = common(stages, query)
    score = np.clip(np.nan_to_num(score), -MAX_VALUE, MAX_VALUE)
    if not rows.size:
        return None
    order = np.argsort(-score[-1], kind="stable")
    chosen = list(dict.fromkeys([*order[:STAGE_ROWS_PER_END].tolist(), *order[::-1][:STAGE_ROWS_PER_END].tolist()]))
    low, high = np.percentile(score, [5, 95], axis=1)
    return {
        "stages": [label(stage) for stage in stages],
        "unit": comparable(stages[-1]),
        "low": low.tolist(),
        "high": high.tolist(),
        "lines": [{"row": int(rows[k]), "score": score[:, k].tolist()} for k in chosen],
    }


def _floats(values: NDArray[np.float64]) -> str:
    return b64encode(np.clip(values, -MAX_VALUE, MAX_VALUE).astype("<f4").tobytes()).decode("ascii")


def _ints(values: NDArray[np.int64]) -> str:
    return b64encode(values.astype("<i4").tobytes()).decode("ascii")
