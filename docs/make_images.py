"""Draws the pictures of README.md and docs/ into docs/images/, from the report that `make demo` left in demo/.

    .venv/bin/python docs/make_images.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ine_callback import InfluenceReport
from ine_callback.report import plots
from ine_callback.report.words import BLUE, ORANGE

HERE = Path(__file__).resolve().parent
INK, PALE, SOFT = "#30343A", "#F4F6F8", "#6B7280"
DPI = 200  # the figures are 8 inches wide: 1600 pixels, sharp at half the width


def digits(report: InfluenceReport, seed: int) -> Figure:
    """The demo's volcano plot beside the rows that it says to look at first."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    from digits import noisy_digits

    train, _, true = noisy_digits(seed)
    images, given = train.tensors
    query = report.recommended_query
    figure = Figure((8.0, 4.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1.0))
    plots.volcano(report, left.subplots(), query)
    right.suptitle("Look at these first", fontsize=10.5, color=INK, fontweight="bold", y=0.985)
    for ax, row in zip(right.subplots(3, 4).flat, report.drop_list(query=query), strict=False):
        ax.imshow(images[row, 0], cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_color("#D9DCE1")
        wrong = bool(given[row] != true[row])
        ax.set_title(f"row {row}", fontsize=7.5, color=SOFT, pad=3)
        ax.set_xlabel(f"labelled {given[row]}", fontsize=8.5, color=ORANGE if wrong else INK, labelpad=3)
    return figure


def box(ax: Axes, x: float, y: float, width: float, height: float, title: str, text: str, color: str = INK) -> None:
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.09", facecolor=PALE, edgecolor=color, linewidth=1.2
    )
    ax.add_patch(patch)
    ax.text(x + 0.14, y + height - 0.15, title, fontsize=9.5, fontweight="bold", color=color, va="top")
    ax.text(x + 0.14, y + height - 0.44, text, fontsize=8.2, color=INK, va="top", linespacing=1.3)


def arrow(ax: Axes, begin: tuple[float, float], end: tuple[float, float], text: str = "", bend: float = 0.0) -> None:
    style = FancyArrowPatch(
        begin, end, arrowstyle="-|>", mutation_scale=11, color=SOFT, linewidth=1.2,
        shrinkA=0, shrinkB=1, connectionstyle=f"arc3,rad={bend}",
    )  # fmt: skip
    ax.add_patch(style)
    if text:
        x, y = (begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2
        beside = abs(begin[0] - end[0]) < 0.1
        ax.text(
            x + (0.09 if beside else 0), y + (0 if beside else 0.09), text, fontsize=7.8, color=SOFT, style="italic",
            ha="left" if beside else "center", va="center" if beside else "bottom",
        )  # fmt: skip


def flow() -> Figure:
    """One training step, and what becomes of it."""
    figure = Figure((8.0, 4.7))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 16), ylim=(0, 9.4))
    ax.axis("off")
    ax.set_aspect("auto")
    scale = 2.0

    def at(x: float, y: float, title: str, text: str, color: str = INK, width: float = 4.5) -> None:
        ax.add_patch(
            FancyBboxPatch(
                (x, y), width, 1.75, boxstyle="round,pad=0,rounding_size=0.16",
                facecolor=PALE, edgecolor=color, linewidth=1.2,
            )
        )  # fmt: skip
        ax.text(x + 0.2, y + 1.55, title, fontsize=9.5, fontweight="bold", color=color, va="top")
        ax.text(x + 0.2, y + 1.02, text, fontsize=8, color=INK, va="top", linespacing=1.35)

    del scale
    ax.text(0.4, 9.05, "Every training step", fontsize=10, color=SOFT, va="center")
    at(0.4, 6.8, "rows", "which dataset rows\nare in this batch")
    at(5.75, 6.8, "capture", "each row's share of the\nstep, read off the backward pass")
    at(11.1, 6.8, "signals", "one number per row and query:\n⟨direction, share⟩", BLUE)
    ax.text(0.4, 6.15, "Every 10 steps", fontsize=10, color=SOFT, va="center")
    at(0.4, 3.9, "queries", "what you ask, e.g. the mean\nvalidation loss: its gradient")
    at(5.75, 3.9, "directions", "that gradient, less what later\nsteps will undo (discount)")
    at(11.1, 3.9, "methods", "the optimizer steps: fold the\nsignals into each row's sums")
    ax.text(0.4, 3.25, "When training ends", fontsize=10, color=SOFT, va="center")
    at(0.4, 1.0, "null", "the same sums with the signals\ndealt to the rows at random")
    at(5.75, 1.0, "scores", "μ, its standard error, p and q\nfor every row and query", BLUE)
    at(11.1, 1.0, "report", "tables, plots, Parquet, HTML;\nwhich rows to look at", ORANGE)
    arrow(ax, (4.9, 7.67), (5.75, 7.67))
    arrow(ax, (10.25, 7.67), (11.1, 7.67))
    arrow(ax, (4.9, 4.77), (5.75, 4.77))
    arrow(ax, (10.25, 5.5), (11.6, 6.8))
    arrow(ax, (13.9, 6.8), (13.9, 5.65))
    arrow(ax, (11.6, 3.9), (10.25, 2.6))
    arrow(ax, (4.9, 1.87), (5.75, 1.87))
    arrow(ax, (10.25, 1.87), (11.1, 1.87))
    ax.text(8.0, 0.4, "Training itself is bit-identical with and without all this.", fontsize=8.5, color=SOFT, ha="center")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("demo"), help="folder of the digits report")
    parser.add_argument("--seed", type=int, default=0, help="seed it was made with")
    args = parser.parse_args()
    images = HERE / "images"
    images.mkdir(exist_ok=True)
    for name, figure in {"digits": digits(InfluenceReport.load(args.report), args.seed), "flow": flow()}.items():
        figure.savefig(images / f"{name}.png", dpi=DPI, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
