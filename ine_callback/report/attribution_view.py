"""A fit-end method's part of a report: whether to believe it, then its extreme rows; in words, and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.applications.fairness import Subspaces, holds_subspaces
from ine_callback.report.effects_view import effects_text, is_effects
from ine_callback.scores import Attribution, Scores
from ine_callback.stats.ranks import spearman
from ine_callback.utilities.words import BLUE, plain, probability, tails

if TYPE_CHECKING:
    from rich.table import Table

ROWS_PER_END, MAX_DETAILED = 5, 4
LEGEND = "A score > 0: training on the row lowers the query."


def by_method(found: Sequence[Attribution]) -> dict[str, list[Attribution]]:
    """Each method's attributions, of several stages in their order."""
    methods: dict[str, list[Attribution]] = {}
    for each in found:
        methods.setdefault(each.method, []).append(each)
    return methods


def section(
    stages: Sequence[Attribution], scores: Scores, queries: Sequence[str] | None = None, k: int = ROWS_PER_END
) -> list[Any]:
    """Parts for a rich group: a method's last stage, and how the earlier ones agree with it.

    Args:
        stages: The method's attributions.
        scores: f-INE's.
        queries: Names of the queries shown; by default the first ones.
        k: Rows shown at each end.
    """
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    found = stages[-1]
    head = Text(headline(found))
    head.append(f"\n{verdict(found)}", "green" if found.reliable else "bold red")
    border = BLUE if found.reliable else "red"
    parts: list[Any] = [Panel(head, title=Text(heading(found)), title_align="left", border_style=border)]
    parts += [Text(f" ✗ {plain(reason)}", "bold white on red") for reason in found.reasons]
    parts.append(Text(legend(found), "dim"))
    parts += [Text(line) for line in earlier(stages)]
    if holds_subspaces(found):
        parts.append(Text(str(Subspaces(found))))
    if is_effects(found):
        parts.append(Text(effects_text(found)))
    for name in [query.name for query in found.queries[:MAX_DETAILED]] if queries is None else queries:
        words = f"{plain(name)} · {about(found, scores, name)}"
        parts.append(Rule(Text(words, "bold"), align="left", style="dim"))
        sides = ends(found, found.column(name), k)
        parts.append(Columns([_table(head_of(found), *side) for side in sides], padding=(0, 3)))
    return parts + [Text(f"Note: {plain(note)}", "dim") for note in found.notes]


def heading(found: Attribution) -> str:
    """The method's names.

    Example:
        >>> from ine_callback.scores import example_attribution
        >>> heading(example_attribution())
        'example'
    """
    return plain(f"{found.title} ({found.method})" if found.title else found.method)


def legend(found: Attribution) -> str:
    """What the columns are."""
    return plain(found.legend or LEGEND)


def moment(at: int | str) -> str:
    """When the method ran, in words."""
    return "end of training" if at == "end" else f"after epoch {at}"


def earlier(stages: Sequence[Attribution]) -> list[str]:
    """A line for each stage before the last: verdict and rank agreement with the last one."""
    *before, last = stages
    lines = []
    for found in before:
        _, here, there = np.intersect1d(found.rows, last.rows, return_indices=True)
        names = [query.name for query in last.queries]
        same = [
            f"{plain(query.name)} {_rank(found.ranking[here, k], last.ranking[there, names.index(query.name)])}"
            for k, query in enumerate(found.queries[:MAX_DETAILED])
            if query.name in names
        ]
        what = f"{verdict(found)}; rank agreement with the {moment(last.at)}: {', '.join(same)}"
        lines.append(f"{moment(found.at).capitalize()}: {what}")
    return lines


def headline(found: Attribution) -> str:
    """The run of the method in one line."""
    return " · ".join([moment(found.at), plain(found.headline) or f"{len(found.rows):,} rows"])


def verdict(found: Attribution) -> str:
    """Whether the ranking can be believed."""
    if not found.checks:
        return "the method checks nothing of itself"
    if found.reliable:
        return "all checks passed"
    return f"UNRELIABLE: do not use {'what fails its check' if is_effects(found) else 'this ranking'}"


def head_of(found: Attribution) -> tuple[str, ...]:
    """Heads of the lines that :func:`ends` makes."""
    if is_effects(found):
        return ("row", "φ", "without it")
    known = (("±", found.ranking_se is not None), ("q", found.q is not None))
    return ("row", plain(found.method), *(name for name, there in known if there))


def ends(found: Attribution, column: int, k: int) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """Title, colour and lines (:func:`head_of`) of the rows at a query's ends, such as the most helpful ones."""
    score = found.ranking[:, column]
    order = np.argsort(-score, kind="stable")
    order = order[np.isfinite(score[order])]
    words = tails(found.queries[column].kind)
    return [
        (words.upper, BLUE, [_line(found, column, row) for row in order[:k]]),
        (words.lower, words.color(-1.0), [_line(found, column, row) for row in order[::-1][:k]]),
    ]


def _line(found: Attribution, column: int, k: int) -> tuple[str, ...]:
    mark = " ?" if found.doubtful is not None and found.doubtful[k, column] else ""
    cells = [str(found.rows[k]), f"{found.ranking[k, column]:+.3g}{mark}".replace("-", "−")]
    if is_effects(found):
        return (*cells, f"{found.removal[k, column]:+.3g}".replace("-", "−"))
    if (se := found.ranking_se) is not None:
        cells.append(f"{se[k, column]:.1g}")
    if found.q is not None:
        cells.append(probability(found.q[k, column]))
    return tuple(cells)


def _table(head: Sequence[str], title: str, color: str, lines: list[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title), title_style=f"bold {color}")
    for name in head:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def about(found: Attribution, scores: Scores, query: str) -> str:
    """What stands behind a query's name: an estimand's question, else how its scores agree with f-INE's."""
    info = found.queries[found.column(query)]
    return plain(info.question) if info.kind == "estimand" else agreement(found, scores, query)


def agreement(found: Attribution, scores: Scores, query: str) -> str:
    """Rank correlation of the method's scores and f-INE's μ over the rows that both have scored, in words."""
    names = [info.name for info in scores.queries]
    mu = np.full(len(found.rows), np.nan)
    known = (found.rows < len(scores.mu)) & (query in names)
    if known.any():
        mu[known] = scores.mu[found.rows[known], names.index(query)]
    score = found.ranking[:, found.column(query)]
    both = np.isfinite(mu) & np.isfinite(score)
    if both.sum() < 3:
        return "not scored by f-INE"
    return f"rank agreement with μ {_rank(mu[both], score[both])}"


def _rank(one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    return f"{spearman(one, other):.2f}" if len(one) > 2 else "unknown"
