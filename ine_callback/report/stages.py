"""A method's scores over the stages of training, on axes that the caller gives (see ``plots.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.plots import FAINT, INK, NULL, dress
from ine_callback.scores import Attribution, Floats
from ine_callback.utilities.words import BLUE, ORANGE, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS_PER_END = 3


def stages(found: Sequence[Attribution], ax: Axes, query: str | None = None) -> None:
    """Scores at each stage, with 95 % bands where standard errors are known.

    Drawn in colour are the rows that are most extreme at the last stage, in grey the middle 90 % of all rows.

    Args:
        found: One method's attributions of several stages, in their order.
        ax: Matplotlib's axes.
        query: Name of the query.

    Raises:
        ValueError: If the method ran at fewer than two stages.
    """
    if len(found) < 2:
        raise ValueError(f"InfluenceReport: the method ran at {len(found)} stages; at=[2, 5, 'end'] runs it at three.")
    rows, score, se = common(found, query)
    x = np.arange(len(found))
    low, high = np.nanpercentile(score, [5, 95], axis=1)
    ax.fill_between(x, low, high, color=NULL, alpha=0.45, linewidth=0, label="middle 90 % of the rows")
    order = np.argsort(-np.nan_to_num(score[-1]), kind="stable")
    for chosen, color, word in (
        (order[:ROWS_PER_END], BLUE, "helpful"),
        (order[::-1][:ROWS_PER_END], ORANGE, "harmful"),
    ):
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
    ax.set_xticks(x, [label(one) for one in found])
    last = found[-1]
    name, unit = last.queries[last.column(query)].name, comparable(last)
    axis = f"{plain(last.method)}, as a {unit}" if unit else plain(last.method)
    dress(ax, f"Influence over training: {plain(name)}", "", f"← harmful     {axis}     helpful →")
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.legend(fontsize=7.5, frameon=False, loc="best")


def label(found: Attribution) -> str:
    """A stage in a word or two."""
    return "end" if found.at == "end" else f"epoch {found.at}"


def comparable(found: Attribution) -> str:
    """Name of the column whose numbers compare between stages, where the method has one: scores shrink with losses."""
    return "correlation" if "correlation" in found.columns else ""


def common(found: Sequence[Attribution], query: str | None) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Rows that every stage scores [R], their comparable scores and standard errors [stages, R], NaN if not known."""
    rows = found[0].rows
    for one in found[1:]:
        rows = np.intersect1d(rows, one.rows)
    score, se = [], []
    for one in found:
        order, column, unit = np.argsort(one.rows), one.column(query), comparable(one)
        at = order[np.searchsorted(one.rows[order], rows)]
        numbers, errors = (one.columns[unit], one.columns.get(f"{unit}_se")) if unit else (one.scores, one.se)
        score.append(numbers[at, column])
        se.append(np.full(len(at), np.nan) if errors is None else errors[at, column])
    return rows, np.stack(score), np.stack(se)
