"""The causal graphs of a report: on axes that the caller gives (see ``plots.py``), and as the page's image."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ine_callback.report.plots import INK
from ine_callback.utilities.optional import need
from ine_callback.utilities.words import BLUE, ORANGE, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ine_callback.effects.reported import Effects

MOST = 4  # graphs in one image
FAINT_EDGE = 0.05  # less probable edges are not drawn
LONGEST_NAME = 18


@dataclass(frozen=True)
class Drawing:
    """A graph to be drawn.

    Attributes:
        title: Above it.
        treatment: Name of the treatment.
        outcome: Name of the outcome.
        adjusted: Names of the columns adjusted for.
        edges: From cause to effect, with the probability of each; 1 where the graph is given.
        paths: Stable paths with their stability, as text below.
    """

    title: str
    treatment: str
    outcome: str
    adjusted: frozenset[str]
    edges: Mapping[tuple[str, str], float]
    paths: tuple[str, ...] = ()


def drawings(effects: Effects) -> list[Drawing]:
    """One for each graph, treatment and outcome; that of the paths comes first."""
    found: list[Drawing] = []
    if effects.edges and effects.paths:
        first = effects.paths[0]
        lines = tuple(f"{one.name}: stability {one.stability:.2f}" for one in effects.paths)
        shown = {edge: chance for edge, chance in effects.edges.items() if chance >= FAINT_EDGE}
        title = "Probability of each edge under the tiers"
        found.append(Drawing(title, first.nodes[0], first.nodes[-1], frozenset(), shown, lines))
    asked: dict[Any, list[Any]] = {}
    for one in effects.found:
        asked.setdefault((one.edges, one.treatment, one.outcome, one.adjustment), []).append(one)
    for (edges, treatment, outcome, adjustment), same in asked.items():
        title = f"{', '.join(one.estimand for one in same)} of {treatment} on {outcome}"
        adjusted = frozenset(name for each in adjustment for name in each)
        found.append(Drawing(title, treatment, outcome, adjusted, dict.fromkeys(edges, 1.0)))
    return [one for one in found if one.edges]


def draw(drawing: Drawing, ax: Axes) -> None:
    """The graph from causes on the left to effects on the right; an edge's width is its probability.

    Args:
        drawing: What to draw.
        ax: Matplotlib's axes.
    """
    places, boxes = _places(drawing), {}
    for name, (x, y) in places.items():
        color = {drawing.treatment: ORANGE, drawing.outcome: BLUE}.get(name, "#ffffff")
        box = {
            "boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": INK,
            "linewidth": 2.0 if name in drawing.adjusted else 0.7,
        }  # fmt: skip
        short = plain(name) if len(name) <= LONGEST_NAME else f"{plain(name)[: LONGEST_NAME - 1]}…"
        text = "#ffffff" if color != "#ffffff" else INK
        # as it is: a name with dollar signs is no formula
        made = ax.text(
            x, y, short, fontsize=8.5, color=text, ha="center", va="center", bbox=box, parse_math=False, zorder=3
        )
        boxes[name] = made.get_bbox_patch()
    for (u, v), chance in drawing.edges.items():
        span = places[v][0] - places[u][0]
        side = 1 if places[u][1] + places[v][1] > 0 else -1
        bend = 0.15 * span if span > 1.5 else 0.0  # passes by what lies between
        style = {
            "arrowstyle": "-|>", "color": INK, "linewidth": 0.5 + 1.5 * chance, "alpha": 0.25 + 0.6 * chance,
            "connectionstyle": f"arc3,rad={-side * bend}", "patchA": boxes[u],
            "patchB": boxes[v],
        }  # fmt: skip
        ax.annotate("", places[v], places[u], arrowprops=style, zorder=4)  # after the boxes, at which it ends
        if chance < 1:
            x, y = (0.5 * (a + b) for a, b in zip(places[u], places[v], strict=True))
            back = {"boxstyle": "square,pad=0.1", "facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.85}
            at = (x, y + side * bend * span / 2)  # where the arc is
            ax.text(*at, f"{chance:.2f}", fontsize=7, color=INK, ha="center", va="center", bbox=back, zorder=5)
    xs, ys = zip(*places.values(), strict=True)
    ax.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
    ax.set_ylim(min(ys) - 0.8, max(ys) + 0.8)
    ax.axis("off")
    ax.set_title(plain(drawing.title), fontsize=9.5, color=INK, loc="left", parse_math=False)
    notes = [plain(line) for line in drawing.paths[:6]]
    if drawing.adjusted:
        notes.append("thick frame: adjusted for")
    if notes:
        ax.text(0, -0.02, "\n".join(notes), transform=ax.transAxes, fontsize=7.5, color=INK, va="top", parse_math=False)


def _places(drawing: Drawing) -> dict[str, tuple[float, float]]:
    """Each node's place: as many steps to the right as its longest chain of causes has."""
    nodes = list(dict.fromkeys(node for edge in drawing.edges for node in edge))
    nodes += [name for name in (drawing.treatment, drawing.outcome) if name not in nodes]
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:  # a graph without cycles settles
        for u, v in drawing.edges:
            depth[v] = max(depth[v], min(depth[u] + 1, len(nodes)))
    layers: dict[int, list[str]] = {}
    for node in nodes:
        layers.setdefault(depth[node], []).append(node)
    found = {}
    for level, names in layers.items():
        for k, name in enumerate(names):  # every other layer is shifted, so that long edges pass beside its nodes
            found[name] = (float(level), (len(names) - 1) / 2 - k + (0.35 if level % 2 else 0.0))
    return found


def image(drawn: Sequence[Drawing]) -> str:
    """The graphs as an address that holds a PNG."""
    drawn = drawn[:MOST]
    heights = [1.6 + 0.62 * max(_widest(one), 1) + 0.16 * len(one.paths[:6]) for one in drawn]
    figure = need("matplotlib.figure", "InfluenceReport.write_html").Figure((6.2, sum(heights)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
    for one, ax in zip(drawn, axes[:, 0], strict=True):
        draw(one, ax)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=140)
    return f"data:image/png;base64,{b64encode(data.getvalue()).decode('ascii')}"


def _widest(drawing: Drawing) -> int:
    levels = [round(x) for x, _ in _places(drawing).values()]
    return max(levels.count(level) for level in levels)
