"""The page's plots as Bokeh models without data, which the page's script fills, query by query; and Bokeh's script.

Bokeh, because its script is small (1.3 MB), draws tens of thousands of points, treats every text as text and runs under
a policy that forbids code made of strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ine_callback.utilities.optional import need

if TYPE_CHECKING:
    from bokeh.plotting import figure

FEATURE = "InfluenceReport.write_html"
HEIGHT = 330  # pixels
# What a point says of its row: columns of its source, with the format of those that are numbers.
ROW = [("row", "row"), ("class", "class"), ("μ", "x %+.3g")]
SCORE = [("95 %", "low %+.3g", "high %+.3g"), ("q", "q %.2g"), ("mean loss", "loss %.3g")]


def script() -> str:
    """BokehJS, whole, without its extensions."""
    resources = need("bokeh.resources", FEATURE)
    return "\n".join(resources.Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)


@lru_cache
def charts() -> dict[str, Any]:
    """Each plot's document by the id of the element that it is put into."""
    embed = need("bokeh.embed", FEATURE)
    makers = (volcano, null, methods, course, tradeoff)
    return {maker.__name__: embed.json_item(maker()) for maker in makers}


def volcano() -> figure:
    """Score against ``-log10 q``: one point a row."""
    plot = _plot("", "−log₁₀ q   (higher: less likely chance)", "tap")
    points = [
        plot.scatter("x", "y", source=_source(name, "x y row class low high q loss"), name=color, size=size,
                     line_color=None, fill_alpha=alpha, nonselection_fill_alpha=alpha, legend_label=name)
        for name, color, size, alpha in (("rest", "null", 5, 0.65), ("low", "low", 7, 0.8), ("high", "high", 7, 0.8))
    ]  # fmt: skip
    _line(plot, "limit")
    _ring(plot)
    _hover(plot, ROW + SCORE, points)
    _legend(plot)
    return plot


def null() -> figure:
    """Densities of the rows' ``z`` and of their null; the axis of density is logarithmic."""
    plot = _plot("", "density of rows", y_axis_type="log", y_range=(0.01, 4))
    bars = _source("null", "left right top bottom")
    plot.quad("left", "right", "top", "bottom", source=bars, name="null", line_color=None, legend_label="by chance")
    for side in ("low", "high"):
        plot.step("x", "y", source=_source(side, "x y"), name=side, line_width=2.5, mode="after", legend_label=side)
    _legend(plot)
    return plot


def methods() -> figure:
    """μ against another method's score, one point a row that both scored."""
    plot = _plot("influence μ (f-INE)", "", "tap")
    columns = "x y row class"
    points = [plot.scatter("x", "y", source=_source("both", columns), name="high", size=6, line_color=None,
                           fill_alpha=0.7, nonselection_fill_alpha=0.7)]  # fmt: skip
    _ring(plot)
    _hover(plot, [*ROW, ("other method", "y %+.3g")], points)
    return plot


def course() -> figure:
    """A method's scores of the extreme rows at each stage of training, over the middle 90 % of all rows."""
    models = need("bokeh.models", FEATURE)
    plot = _plot("", "", y_range=models.DataRange1d(), x_range=models.FactorRange(name="stages"))
    plot.varea(
        "x", "low", "high", source=_source("middle", "x low high"), name="null", fill_alpha=0.5,
        legend_label="middle 90 % of the rows",
    )  # fmt: skip
    lines = _source("lines", "xs ys row side")
    plot.multi_line("xs", "ys", source=lines, name="lines", line_color="side", line_width=2)
    points = _source("points", "x y row side")
    dots = plot.scatter("x", "y", source=points, name="lines", fill_color="side", line_color=None, size=7)
    _hover(plot, [("row", "row"), ("stage", "x"), ("score", "y %+.3g")], [dots])
    _legend(plot)
    return plot


def tradeoff() -> figure:
    """How well the best test tells a training with each class's rows from one without: type-II against type-I error."""
    plot = _plot("type-I error α", "smallest type-II error β", x_range=(0, 1), y_range=(0, 1.02))
    curves = _source("curves", "xs ys name size mean z color")
    drawn = plot.multi_line("xs", "ys", source=curves, name="lines", line_color="color", line_width=2, line_alpha=0.85)
    _line(plot, "chance")
    shown = [("class", "name"), ("rows", "size"), ("mean μ", "mean %+.3g"), ("z", "z %+.1f")]
    _hover(plot, shown, [drawn], line_policy="nearest")
    return plot


def _plot(x: str, y: str, tools: str = "", **options: Any) -> figure:
    options = {"x_range": (-1, 1), "y_range": (-1, 1)} | options  # the script knows the data's ends
    plotting = need("bokeh.plotting", FEATURE)
    plot: figure = plotting.figure(
        height=HEIGHT, sizing_mode="stretch_width", tools=f"pan,box_zoom,wheel_zoom,reset,{tools}".rstrip(","),
        active_drag=None, active_scroll=None,  # a finger scrolls the page
        toolbar_location="right", x_axis_label=x, y_axis_label=y, min_width=200, **options,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    for axis in plot.axis:
        axis.minor_tick_line_color = None
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui"
    return plot


def _source(name: str, columns: str) -> Any:
    return need("bokeh.models", FEATURE).ColumnDataSource({column: [] for column in columns.split()}, name=name)


def _line(plot: figure, name: str) -> None:
    """A dashed line for comparison."""
    plot.line("x", "y", source=_source(name, "x y"), name="soft", line_dash="dashed", line_width=1)


def _ring(plot: figure) -> None:
    """Around the row that the reader chose."""
    plot.scatter("x", "y", source=_source("chosen", "x y"), name="ink", size=15, fill_color=None, line_width=2)


def _hover(plot: figure, shown: Sequence[tuple[str, ...]], renderers: list[Any], **options: Any) -> None:
    """A tooltip in the page's colours; Bokeh's own list of pairs has a colour that CSS cannot change."""
    models, dom = need("bokeh.models", FEATURE), need("bokeh.models.dom", FEATURE)
    rows = []
    for label, *columns in shown:
        values: list[Any] = []
        for column in columns:
            field, _, form = column.partition(" ")
            values += [" … "] if values else []  # an interval's ends
            values.append(
                dom.ValueRef(field=field, format=form, formatter="printf") if form else dom.ValueRef(field=field)
            )
        name = dom.Span(children=[label], style={"color": "var(--soft)", "text-align": "right"})
        rows += [name, dom.Span(children=values)]
    grid = {"display": "grid", "grid-template-columns": "auto auto", "gap": "1px 10px"}
    content = dom.Template(children=[dom.Div(children=rows, style=grid)])
    plot.add_tools(models.HoverTool(tooltips=content, renderers=renderers, **options))


def _legend(plot: figure) -> None:
    legend = plot.legend[0]
    plot.add_layout(legend, "above")
    legend.update(
        orientation="horizontal", background_fill_color=None, border_line_color=None, padding=0, margin=0,
        label_text_font="system-ui", label_text_font_size="12px",
    )  # fmt: skip
