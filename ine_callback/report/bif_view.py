"""BIF's part of a report in the terminal: whether the chains can be believed, then the extreme rows."""

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
LEGEND = """\
BIF > 0: training on the row lowers the query. It is the covariance of the row's loss and the query over the chains;
± is its Monte-Carlo error, and q tests "the covariance is 0" in this posterior, not over other trainings."""


def section(found: BIFScores, scores: Scores) -> list[Any]:
    """Parts for a rich group."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    chains, draws = found.loss.shape
    head = Text(
        f"{chains} chains x {draws} draws · {len(found.rows):,} rows · step {found.settings.get('step_size', 0):.3g} · "
        f"n_beta {found.settings.get('n_beta', 0):g} · localization {found.settings.get('localization', 0):.3g}"
    )
    verdict = "all screens passed" if found.reliable else "UNRELIABLE: do not use this ranking"
    head.append(f"\n{verdict}", "green" if found.reliable else "bold red")
    border = BLUE if found.reliable else "red"
    parts: list[Any] = [Panel(head, title="Bayesian influence (BIF)", title_align="left", border_style=border)]
    parts += [Text(f" ✗ {plain(reason)}", "bold white on red") for reason in found.reasons]
    parts.append(Text(LEGEND, "dim"))
    for column, query in enumerate(found.queries[:DETAILED]):
        agreement = agreement_with_fine(found, scores, query.name)
        words = f"{plain(query.name)} · rank agreement with μ {agreement:.2f}"
        parts.append(Rule(Text(words, "bold"), align="left", style="dim"))
        order = np.argsort(-found.scores[:, column], kind="stable")
        sides = [("Most helpful", order[:EXTREMES], BLUE), ("Most harmful", order[::-1][:EXTREMES], ORANGE)]
        parts.append(Columns([_table(found, column, *side) for side in sides], padding=(0, 3)))
    return parts + [Text(f"Note: {plain(note)}", "dim") for note in found.notes]


def _table(found: BIFScores, column: int, title: str, which: Any, color: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title), title_style=f"bold {color}")
    for name in ("row", "BIF", "±", "q"):
        table.add_column(name, justify="right", no_wrap=True)
    for k in which:
        score, se = found.scores[k, column], found.se[k, column]
        table.add_row(
            str(found.rows[k]), f"{score:+.3g}".replace("-", "−"), f"{se:.1g}", probability(found.q[k, column])
        )
    return table


def agreement_with_fine(found: BIFScores, scores: Scores, query: str) -> float:
    """Spearman correlation of BIF and f-INE's μ over the rows that both have scored; NaN if f-INE lacks the query."""
    names = [info.name for info in scores.queries]
    if query not in names:
        return float("nan")
    mu = scores.mu[found.rows, names.index(query)]
    both = np.isfinite(mu)
    if both.sum() < 3:
        return float("nan")
    return float(spearmanr(mu[both], found.scores[both, found.column(query)])[0])
