"""Three plots of one query. They draw on the axes they are given: no pyplot, no global style, no backend.

Colours are safe for colour-blind readers: orange marks the end to inspect (harmful rows; for a ``"self"`` query the
rows of large self-influence), blue the other end, grey the null and everything that is not flagged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.utilities.optional import need
from ine_callback.utilities.words import number, plain, tails

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ine_callback.report.contents import Contents

INK, FAINT, NULL = "#30343A", "#D9DCE1", "#B9BEC6"
FLAG_AT = 0.05
MAX_TITLE = 80  # characters
MAX_VALUE = 1e100  # only damaged files have larger values, and an axis would overflow
MAX_LABELS = 6  # rows named at each end of the volcano plot; three times as many are tried


def distribution(report: Contents, ax: Axes, query: str | None = None) -> None:
    """Histogram of ``z = mu / null_sd`` over its permutation null, density on a logarithmic axis.

    Bars above the grey null are more rows than chance puts there.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ine_callback.report import example_report
        >>> ax = Figure().subplots()
        >>> distribution(example_report(), ax, query="val")
        >>> ax.get_xlabel()
        '← harmful     z = μ / its sd under the null     helpful →'
    """
    ends = tails(report.info(query).kind)
    found = densities(report, report.column(query))
    edges, reach = found.edges, found.edges[-1]
    if found.draws:
        ax.stairs(found.null, edges, fill=True, color=NULL, linewidth=0, label=f"null, {found.draws:,} draws")
    else:
        grid = np.linspace(-reach, reach, 400)
        ax.fill_between(grid, _normal(grid), color=NULL, linewidth=0, label="standard normal null")
    middle = len(found.rows) // 2
    for word, sign, first in ((ends.low, -1.0, 0), (ends.high, 1.0, middle)):
        half, its_edges = found.rows[first : first + middle], edges[first : first + middle + 1]
        ax.stairs(half, its_edges, color=ends.color(sign), linewidth=1.7, baseline=None, label=f"{word} rows")
    ax.set_yscale("log")
    ax.set_ylim(bottom=found.floor, top=4.0)
    ax.set_xlim(-reach, reach)
    dress(ax, "Scores over the null", _axis(ends, "z = μ / its sd under the null"), "density of rows")
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    _legend(ax)


def volcano(report: Contents, ax: Axes, query: str | None = None, q: float = FLAG_AT) -> None:
    """Score against ``-log10`` of its q-value; rows with q-value at most ``q`` in colour, the extremes named by id."""
    column = report.column(query)
    ends = tails(report.info(query).kind)
    mu, value = np.clip(report.scores.mu[:, column], -MAX_VALUE, MAX_VALUE), report.scores.q[:, column]
    rows = np.flatnonzero(np.isfinite(mu) & np.isfinite(value))
    height = heights(value)
    line = -float(np.log10(max(q, 1e-12)))
    flagged = value <= q
    groups = [(rows[~flagged[rows]], NULL, "not flagged")]
    for sign, word in ((-1.0, ends.low), (1.0, ends.high)):
        chosen = rows[flagged[rows] & (np.sign(mu[rows]) == sign)]
        groups.append((chosen, ends.color(sign), f"{chosen.size:,} {word}"))
    size = float(np.clip(8000 / max(rows.size, 1), 5, 30))
    for chosen, color, label in groups:
        if not chosen.size:
            continue
        area = size if color == NULL else max(size, 14.0)
        points = ax.scatter(mu[chosen], height[chosen], s=area, color=color, alpha=0.8, linewidths=0, label=label)
        points.set_rasterized(True)  # as vectors 100,000 points make a file of many megabytes
    reach = 1.15 * max(float(np.abs(mu[rows]).max(initial=0.0)), 1e-12)
    top = 1.22 * max(float(height[rows].max(initial=0.0)), 1.5 * line, 1e-3)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-0.04 * top, top)
    ax.axhline(line, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.text(-0.985 * reach, line, f"q = {q:g}", fontsize=7.5, color=INK, va="bottom")
    ax.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    order = rows[np.argsort(-ends.suspect * mu[rows], kind="stable")]  # the suspect end is named first
    for side in (order, order[::-1]):
        _name(ax, [int(row) for row in side[: 3 * MAX_LABELS] if flagged[row]], mu, height)
    dress(ax, "Which rows stand out", _axis(ends), "−log₁₀ q   (higher: less likely chance)")
    _legend(ax)


def extremes(report: Contents, ax: Axes, query: str | None = None, k: int = 8) -> None:
    """The ``k`` largest and ``k`` smallest scores with their 95 % intervals; each row's mean loss at the right."""
    ends = tails(report.info(query).kind)
    name = report.queries[report.column(query)]
    high, low = report.top(k, name), report.bottom(k, name)
    shown = {one.row: one for one in [*high, *reversed(low)]}  # few rows: the two ends overlap
    entries = sorted(shown.values(), key=lambda one: one.mu)
    gap = len(entries) == len(high) + len(low)
    places = [index + (0.8 if gap and index >= len(low) else 0.0) for index in range(len(entries))]
    for place, one in zip(places, entries, strict=True):
        color, flagged = ends.color(one.mu), one.q <= FLAG_AT
        width = min(1.96 * one.se, MAX_VALUE) if np.isfinite(one.se) else None
        ax.errorbar(
            np.clip(one.mu, -MAX_VALUE, MAX_VALUE), place, xerr=width, fmt="o", color=color, markersize=5,
            elinewidth=1.6, markeredgewidth=1.3, markerfacecolor=color if flagged else "white",
        )  # fmt: skip
        if np.isfinite(one.mean_loss):
            beside, text = ax.get_yaxis_transform(), number(one.mean_loss, 2)
            ax.text(1.015, place, text, transform=beside, fontsize=7.5, color=INK, va="center", clip_on=False)
    ax.axvline(0.0, color=INK, linewidth=0.8)
    if entries:
        ax.set_ylim(places[0] - 0.8, places[-1] + 0.8)
        reach = 1.08 * max(np.nanmax(np.abs([one.mu, one.low, one.high])) for one in entries)
        reach = min(max(reach, 1e-12), 4 * MAX_VALUE)
        ax.set_xlim(-reach, reach)
    if any(np.isfinite(one.mean_loss) for one in entries):
        ax.text(1.015, 1.0, "loss", transform=ax.transAxes, fontsize=7.5, color=INK, va="bottom", style="italic")
    ax.set_yticks(places, [f"row {one.row}" for one in entries])
    dress(ax, "The extremes, with 95 % intervals", _axis(ends), "")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=FAINT, linewidth=0.6)


PLOTS: dict[str, Callable[..., None]] = {"distribution": distribution, "volcano": volcano, "extremes": extremes}


def figure(report: Contents, query: str | None = None) -> Figure:
    """All three plots of a query side by side."""
    drawn = blank(15.0, 4.4)
    axes: NDArray[Any] = drawn.subplots(1, 3)
    for plot, ax in zip(PLOTS.values(), axes, strict=True):
        plot(report, ax, query)
    drawn.suptitle(plain(report.info(query).name)[:MAX_TITLE], fontsize=12, color=INK, parse_math=False)
    return drawn


def blank(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    drawn: Figure = need("matplotlib.figure", "InfluenceReport plots").Figure((width, height), layout="constrained")
    return drawn


@dataclass(frozen=True)
class Densities:
    """Histograms of ``z = mu / null_sd`` and of its null, over the same bins.

    Attributes:
        edges: Bins' edges [B + 1], symmetric, 0 among them, so that no bar mixes signs.
        null: Density of the null in each bin [B]; the standard normal's where the report has no draws.
        rows: Density of the rows in each bin [B].
        draws: Number of draws of the null.
        floor: Where a logarithmic axis begins: a bar of one row is visible.
    """

    edges: NDArray[np.float64]
    null: NDArray[np.float64]
    rows: NDArray[np.float64]
    draws: int
    floor: float


def densities(report: Contents, column: int) -> Densities:
    """What :func:`distribution` draws."""
    z, null = _z(report, column), report.scores.null_mu[column]
    null = null[np.abs(null) < MAX_VALUE]
    reach = max(4.0, float(np.abs(np.concatenate([z, null])).max(initial=0.0)) * 1.04)
    edges = np.linspace(-reach, reach, 2 * int(np.clip(np.sqrt(z.size), 15, 45)) + 1)
    expected = _density(null, edges) if null.size else _normal((edges[1:] + edges[:-1]) / 2)
    single = [1.0 / (size * (edges[1] - edges[0])) for size in (null.size, z.size) if size]
    return Densities(edges, expected, _density(z, edges), null.size, 0.5 * min([*single, 0.01]))


def heights(q: NDArray[np.float64]) -> NDArray[np.float64]:
    """``-log10 q``, with a q-value of 0 a little above the others; NaN stays."""
    smallest = float(q[q > 0].min(initial=1.0))
    return np.asarray(-np.log10(np.maximum(q, smallest / 10)), dtype=np.float64)


def _normal(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), dtype=np.float64)


def _z(report: Contents, column: int) -> NDArray[np.float64]:
    mu, sd = report.scores.mu[:, column], report.scores.null_sd[:, column]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        z = mu / sd
    return np.asarray(z[np.abs(z) < MAX_VALUE], dtype=np.float64)


def _density(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.histogram(values, edges)[0]
    return np.asarray(counts / (max(values.size, 1) * np.diff(edges)), dtype=np.float64)


def _axis(ends: Any, what: str = "") -> str:
    return f"← {ends.low}     {what or ends.axis}     {ends.high} →"


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, axis names and style; a title may hold foreign text."""
    title = title if len(title) <= MAX_TITLE else title[:MAX_TITLE] + "…"
    ax.set_title(title, fontsize=10.5, color=INK, loc="left", fontweight="bold", pad=10, parse_math=False)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK, length=3, width=0.7)
    ax.patch.set_alpha(0.0)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.7)


def _legend(ax: Axes) -> None:
    if not ax.get_legend_handles_labels()[0]:  # no row was observed
        return
    ax.legend(
        loc="upper left", ncols=3, fontsize=7.5, frameon=False, borderaxespad=0.2, columnspacing=1.1, handlelength=1.3
    )


def _name(ax: Axes, rows: list[int], mu: NDArray[np.float64], height: NDArray[np.float64]) -> None:
    """Writes row ids beside their points, towards 0, leaving out ids that would touch an earlier one."""
    bottom, top = ax.get_ylim()
    placed: list[float] = []
    for row in rows:
        level = (height[row] - bottom) / (top - bottom)
        if len(placed) == MAX_LABELS or any(abs(level - other) < 0.045 for other in placed):
            continue
        placed.append(level)
        inward = -float(np.sign(mu[row]))
        ax.annotate(
            str(row), (mu[row], height[row]), xytext=(6 * inward, 0), textcoords="offset points",
            fontsize=7.5, color=INK, ha="left" if inward > 0 else "right", va="center",
        )  # fmt: skip
