"""BIF's part of a report: whether the chains can be believed, then the extreme rows; in words, and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.methods.bif.scores import BIFScores
from ine_callback.report.words import BLUE, ORANGE, plain, probability
from ine_callback.scores import Scores
from ine_callback.stats.ranks import spearman

if TYPE_CHECKING:
    from rich.table import Table

EXTREMES, DETAILED = 5, 4
HEAD = ("row", "BIF", "±", "q")
LEGEND = """\
BIF > 0: training on the row lowers the query. It is the {what} of the row's loss and the query over the chains;
± is its Monte-Carlo error, and q tests "the covariance is 0" in this posterior, not over other trainings.
? marks a score that is mostly common drift, or has fewer than 50 effective draws behind it."""


def section(stages: Sequence[BIFScores], scores: Scores) -> list[Any]:
    """Parts for a rich group: the last stage, and how the earlier ones agree with it."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    found = stages[-1]
    head = Text(headline(found))
    head.append(f"\n{verdict(found)}", "green" if found.reliable else "bold red")
    border = BLUE if found.reliable else "red"
    parts: list[Any] = [Panel(head, title="Bayesian influence (BIF)", title_align="left", border_style=border)]
    parts += [Text(f" ✗ {plain(reason)}", "bold white on red") for reason in found.reasons]
    parts.append(Text(legend(found), "dim"))
    parts += [Text(line) for line in earlier(stages)]
    for column, query in enumerate(found.queries[:DETAILED]):
        words = f"{plain(query.name)} · {agreement(found, scores, query.name)}"
        parts.append(Rule(Text(words, "bold"), align="left", style="dim"))
        parts.append(Columns([_table(*side) for side in ends(found, column, EXTREMES)], padding=(0, 3)))
    return parts + [Text(f"Note: {plain(note)}", "dim") for note in found.notes]


def legend(found: BIFScores) -> str:
    """What the columns are."""
    return LEGEND.format(what="correlation" if found.settings.get("normalized") else "covariance")


def moment(at: int | str) -> str:
    """When the chains ran, in words."""
    return "end of training" if at == "end" else f"after epoch {at}"


def earlier(stages: Sequence[BIFScores]) -> list[str]:
    """A line for each stage before the last: verdict and rank agreement with the last one."""
    *before, last = stages
    lines = []
    for found in before:
        _, here, there = np.intersect1d(found.rows, last.rows, return_indices=True)
        same = [
            f"{plain(query.name)} {_rank(found.ranking[here, k], last.ranking[there, k])}"
            for k, query in enumerate(found.queries[:DETAILED])
        ]
        what = f"{verdict(found)}; rank agreement with the {moment(last.at)}: {', '.join(same)}"
        lines.append(f"{moment(found.at).capitalize()}: {what}")
    return lines


def headline(found: BIFScores) -> str:
    """The chains in numbers."""
    (chains, draws), settings = found.loss.shape, found.settings
    return (
        f"{moment(found.at)} · {chains} chains x {draws} draws · {len(found.rows):,} rows · "
        f"step {settings.get('step_size', 0):.3g} · n_beta {settings.get('n_beta', 0):g} · "
        f"localization {settings.get('localization', 0):.3g}"
    )


def verdict(found: BIFScores) -> str:
    """Whether the ranking can be believed."""
    return "all screens passed" if found.reliable else "UNRELIABLE: do not use this ranking"


def ends(found: BIFScores, column: int, k: int) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """Title, colour and lines (:data:`HEAD`) of a query's most helpful and most harmful rows."""
    order = np.argsort(-found.ranking[:, column], kind="stable")
    return [
        ("Most helpful", BLUE, [_line(found, column, row) for row in order[:k]]),
        ("Most harmful", ORANGE, [_line(found, column, row) for row in order[::-1][:k]]),
    ]


def _line(found: BIFScores, column: int, k: int) -> tuple[str, ...]:
    score, se = found.ranking[k, column], found.se[k, column]
    if found.settings.get("normalized"):
        se /= found.row_sd[k] * found.query_sd[column]
    mark = " ?" if found.doubtful[k, column] else ""
    return str(found.rows[k]), f"{score:+.3g}{mark}".replace("-", "−"), f"{se:.1g}", probability(found.q[k, column])


def _table(title: str, color: str, lines: list[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title), title_style=f"bold {color}")
    for name in HEAD:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def agreement(found: BIFScores, scores: Scores, query: str) -> str:
    """Rank correlation of BIF and f-INE's μ over the rows that both have scored, in words."""
    names = [info.name for info in scores.queries]
    mu = np.full(len(found.rows), np.nan)
    known = (found.rows < len(scores.mu)) & (query in names)
    if known.any():
        mu[known] = scores.mu[found.rows[known], names.index(query)]
    both = np.isfinite(mu)
    if both.sum() < 3:
        return "not scored by f-INE"
    return f"rank agreement with μ {_rank(mu[both], found.ranking[both, found.column(query)])}"


def _rank(one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    return f"{spearman(one, other):.2f}" if len(one) > 2 else "unknown"
