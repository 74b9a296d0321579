"""BIF's part of a report: whether the chains can be believed, then the extreme rows; in words, and in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from ine_callback.bif.scores import BIFScores
from ine_callback.report.words import BLUE, ORANGE, plain, probability
from ine_callback.scores import Scores

if TYPE_CHECKING:
    from rich.table import Table

EXTREMES, DETAILED = 5, 4
HEAD = ("row", "BIF", "±", "q")
LEGEND = """\
BIF > 0: training on the row lowers the query. It is the covariance of the row's loss and the query over the chains;
± is its Monte-Carlo error, and q tests "the covariance is 0" in this posterior, not over other trainings."""


def section(found: BIFScores, scores: Scores) -> list[Any]:
    """Parts for a rich group."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    head = Text(headline(found))
    head.append(f"\n{verdict(found)}", "green" if found.reliable else "bold red")
    border = BLUE if found.reliable else "red"
    parts: list[Any] = [Panel(head, title="Bayesian influence (BIF)", title_align="left", border_style=border)]
    parts += [Text(f" ✗ {plain(reason)}", "bold white on red") for reason in found.reasons]
    parts.append(Text(LEGEND, "dim"))
    for column, query in enumerate(found.queries[:DETAILED]):
        words = f"{plain(query.name)} · {agreement(found, scores, query.name)}"
        parts.append(Rule(Text(words, "bold"), align="left", style="dim"))
        parts.append(Columns([_table(*side) for side in ends(found, column, EXTREMES)], padding=(0, 3)))
    return parts + [Text(f"Note: {plain(note)}", "dim") for note in found.notes]


def headline(found: BIFScores) -> str:
    """The chains in numbers."""
    chains, draws = found.loss.shape
    return (
        f"{chains} chains x {draws} draws · {len(found.rows):,} rows · step {found.settings.get('step_size', 0):.3g} · "
        f"n_beta {found.settings.get('n_beta', 0):g} · localization {found.settings.get('localization', 0):.3g}"
    )


def verdict(found: BIFScores) -> str:
    """Whether the ranking can be believed."""
    return "all screens passed" if found.reliable else "UNRELIABLE: do not use this ranking"


def ends(found: BIFScores, column: int, k: int) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """Title, colour and lines (:data:`HEAD`) of a query's most helpful and most harmful rows."""
    order = np.argsort(-found.scores[:, column], kind="stable")
    return [
        ("Most helpful", BLUE, [_line(found, column, row) for row in order[:k]]),
        ("Most harmful", ORANGE, [_line(found, column, row) for row in order[::-1][:k]]),
    ]


def _line(found: BIFScores, column: int, k: int) -> tuple[str, ...]:
    score, se = found.scores[k, column], found.se[k, column]
    return str(found.rows[k]), f"{score:+.3g}".replace("-", "−"), f"{se:.1g}", probability(found.q[k, column])


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
    mu = scores.mu[found.rows, names.index(query)] if query in names else np.empty(0)
    both = np.isfinite(mu)
    if both.sum() < 3:
        return "not scored by f-INE"
    return f"rank agreement with μ {spearmanr(mu[both], found.scores[both, found.column(query)])[0]:.2f}"
