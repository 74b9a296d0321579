"""Bayesian influence over the stages of training, on axes that the caller gives (see ``plots.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ine_callback.methods.bif.scores import BIFScores
from ine_callback.report.plots import FAINT, INK, NULL, dress
from ine_callback.report.words import BLUE, ORANGE, plain
from ine_callback.scores import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ine_callback.report.report import InfluenceReport

NAMED = 3  # rows drawn at each end


def stages(report: InfluenceReport, ax: Axes, query: str | None = None) -> None:
    """Correlation of loss and query at each stage, with 95 % Monte-Carlo bands.

    Drawn in colour are the rows that are most extreme at the last stage, in grey the middle 90 % of all rows.
    Correlations, for covariances shrink with the losses as training goes on.

    Args:
        report: With ``BIF(at=[…])`` of several stages.
        ax: Matplotlib's axes.
        query: Name of the query.

    Raises:
        ValueError: If chains ran at fewer than two stages.
    """
    found = report.bif_stages
    if len(found) < 2:
        raise ValueError(
            f"InfluenceReport: chains ran at {len(found)} stages; BIF(at=[2, 5, 'end']) runs them at three."
        )
    rows, score, se = common(found, query)
    x = np.arange(len(found))
    low, high = np.nanpercentile(score, [5, 95], axis=1)
    ax.fill_between(x, low, high, color=NULL, alpha=0.45, linewidth=0, label="middle 90 % of the rows")
    order = np.argsort(-np.nan_to_num(score[-1]), kind="stable")
    for chosen, color, word in ((order[:NAMED], BLUE, "helpful"), (order[::-1][:NAMED], ORANGE, "harmful")):
        for k in chosen:
            mean, reach = score[:, k], 1.96 * se[:, k]
            ax.fill_between(x, mean - reach, mean + reach, color=color, alpha=0.12, linewidth=0)
            ax.plot(x, mean, color=color, marker="o", markersize=3.5, linewidth=1.4)
            ax.annotate(
                str(rows[k]), (x[-1], mean[-1]), xytext=(6, 0), textcoords="offset points",
                fontsize=7.5, color=INK, va="center",
            )  # fmt: skip
        ax.plot([], [], color=color, marker="o", markersize=3.5, label=f"most {word} at the last stage")
    ax.axhline(0.0, color=INK, linewidth=0.8)
    ax.set_xticks(x, ["end" if one.at == "end" else f"epoch {one.at}" for one in found])
    name = found[-1].queries[found[-1].column(query)].name
    dress(ax, f"Influence over training: {plain(name)}", "", "← harmful     BIF, as a correlation     helpful →")
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.legend(fontsize=7.5, frameon=False, loc="best")


def common(found: Sequence[BIFScores], query: str | None) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Rows that every stage scores [R], their correlations with the query and standard errors [stages, R]."""
    rows = found[0].rows
    for one in found[1:]:
        rows = np.intersect1d(rows, one.rows)
    score, se = [], []
    for one in found:
        order, column = np.argsort(one.rows), one.column(query)
        at = order[np.searchsorted(one.rows[order], rows)]
        score.append(one.correlation[at, column])
        se.append(one.se[at, column] / (one.row_sd[at] * one.query_sd[column]))
    return rows, np.stack(score), np.stack(se)
