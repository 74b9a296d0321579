"""Draws the pictures of README.md and docs/ into docs/images/, from the report that `make demo` left in demo/.

Those of the tutorial and of fair subspaces are drawn from what these pages' own code leaves, that of rows that act
alike from what examples/ask_later.py leaves.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ine_callback import InfluenceReport
from ine_callback.report import plots
from ine_callback.report.fairness_plot import fairness as draw_path
from ine_callback.utilities.words import BLUE, ORANGE

HERE = Path(__file__).resolve().parent
INK, PALE, SOFT, FAINT = "#30343A", "#F4F6F8", "#6B7280", "#D9DCE1"
DPI = 200  # the figures are 8 inches wide: 1600 pixels, sharp at half the width


def digits(report: InfluenceReport, seed: int) -> Figure:
    """The demo's scores over their null, beside the rows that it says to look at first."""
    train, _, true = _digits(seed)
    images, given = train.tensors
    query = report.recommended_query
    suspects = report.drop_list(query=query)
    figure = Figure((8.0, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1.0), wspace=0.02)
    ax = left.subplots()
    plots.distribution(report, ax, query)
    ax.set_xlim(left=-6.5)
    ax.set_title("Self-influence of 1,437 rows", fontsize=10.5, color=INK, loc="left", fontweight="bold", pad=10)
    right.suptitle(f"The first 12 of {len(suspects)} rows to look at", fontsize=10.5, color=INK, fontweight="bold")
    for ax, row in zip(right.subplots(3, 4).flat, suspects, strict=False):
        ax.imshow(images[row, 0], cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_color(FAINT)
        ax.set_title(f"row {row}", fontsize=7.5, color=SOFT, pad=3)
        color = ORANGE if given[row] != true[row] else INK
        ax.set_xlabel(f"labelled {given[row]}", fontsize=8.5, color=color, labelpad=3)
    return figure


def screenshot(report: InfluenceReport, seed: int, path: Path) -> None:
    """The demo's page as a browser shows it; needs playwright and a Chromium."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as folder, sync_playwright() as play:
        page = report.write_html(Path(folder) / "report.html", samples=_digits(seed)[0])
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1560}, device_scale_factor=1.2)
        tab.goto(page.as_uri())
        tab.wait_for_selector("#panel[aria-busy=false]")
        tab.locator("#first .card-row").nth(1).click()
        tab.screenshot(path=path)
        browser.close()
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def alike(path: Path) -> None:
    """A mislabelled row on the page of examples/ask_later.py, and the rows nearest to it."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as folder, sync_playwright() as play:
        subprocess.run([sys.executable, HERE.parent / "examples" / "ask_later.py", "--out", folder], check=True)
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 620, "height": 900}, device_scale_factor=2)
        tab.goto((Path(folder) / "report.html").as_uri())
        tab.wait_for_selector("#panel[aria-busy=false]")
        tab.locator("#first .card-row").first.click()
        tab.locator("#detail").screenshot(path=path)
        browser.close()
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def _digits(seed: int) -> tuple[Any, Any, Any]:
    sys.path.insert(0, str(HERE.parent / "examples"))
    from digits import noisy_digits

    return noisy_digits(seed)


def tutorial() -> Figure:
    """What the tutorial finds: the first suspects, and rows on its tested list whose labels are right."""
    made = _run("tutorial.md", "## Keep it")  # what follows writes files
    figure = Figure((8.0, 3.0), layout="constrained")
    rows = {"First of the ranking": made["ranked"], "On the tested list, and right": made["missed"]}
    for part, (title, chosen) in zip(figure.subfigures(2, 1), rows.items(), strict=True):
        part.suptitle(title, fontsize=10, color=INK, fontweight="bold", x=0.01, ha="left")
        for ax, row in zip(part.subplots(1, 8), chosen, strict=False):
            ax.imshow(made["x"][row].view(8, 8), cmap="gray_r")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_color(FAINT)
            color = ORANGE if made["is_wrong"][row] else INK
            ax.set_xlabel(f"labelled {made['y'][row]}", fontsize=8.5, color=color, labelpad=3)
    return figure


def fairness() -> Figure:
    """The trade-off path of the page on fair subspaces."""
    figure = Figure((6.4, 3.6), layout="constrained")
    draw_path(_run("methods/fairness.md", "In a fit")["found"], figure.subplots())
    return figure


def _run(page: str, until: str) -> dict[str, Any]:
    """What a page's Python blocks leave, up to a line that begins so."""
    made: dict[str, Any] = {"__name__": page}
    text = (HERE / page).read_text(encoding="utf-8").partition(f"\n{until}")[0]
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)), made)
    return made


def flow() -> Figure:
    """One training step, and what becomes of it."""
    figure = Figure((8.0, 4.1))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 16), ylim=(0, 8.2))
    ax.axis("off")
    columns, high, middle, low = (0.25, 4.25, 8.25, 12.25), 5.55, 2.95, 0.35
    _heading(ax, columns[0], 7.75, "Every training step")
    _box(ax, columns[0], high, "rows", "which dataset rows\nare in this batch")
    _box(ax, columns[1], high, "capture", "per-sample gradients,\nfrom the backward pass")
    _box(ax, columns[2], high, "signals", "⟨direction, contribution⟩:\na number a row and query", BLUE)
    _box(ax, columns[3], high, "methods", "add signals to each row's\nsums, and to a null")
    _heading(ax, columns[0], 4.0, "Every 20 steps")
    _box(ax, columns[1], middle, "queries", "what you ask, for instance the\nmean validation loss")
    _box(ax, columns[2], middle, "directions", "their gradients, times the\ndiscount")
    _heading(ax, columns[2], 1.4, "When training ends", align="right", shift=WIDTH)
    _box(ax, columns[3], middle, "scores", "μ, standard error, p and q\nfor each row and query", BLUE)
    _box(ax, columns[3], low, "report", "tables, plots, files:\nwhich rows to look at", ORANGE)
    half = WIDTH / 2
    for left in columns[:3]:
        _arrow(ax, (left + WIDTH, high + TALL / 2), (left + 4.0, high + TALL / 2))
    _arrow(ax, (columns[1] + WIDTH, middle + TALL / 2), (columns[2], middle + TALL / 2))
    _arrow(ax, (columns[2] + half, middle + TALL), (columns[2] + half, high))
    _arrow(ax, (columns[3] + half, high), (columns[3] + half, middle + TALL))
    _arrow(ax, (columns[3] + half, middle), (columns[3] + half, low + TALL))
    _heading(ax, columns[0], 0.8, "Training is bit-identical with and without all this.")
    return figure


WIDTH, TALL = 3.5, 1.75


def _heading(ax: Axes, x: float, y: float, text: str, align: str = "left", shift: float = 0.0) -> None:
    ax.text(x + shift, y, text, fontsize=9.5, color=SOFT, va="center", ha=align)


def _box(ax: Axes, x: float, y: float, title: str, text: str, color: str = INK) -> None:
    style = "round,pad=0,rounding_size=0.16"
    ax.add_patch(FancyBboxPatch((x, y), WIDTH, TALL, style, facecolor=PALE, edgecolor=color, linewidth=1.2))
    ax.text(x + 0.16, y + TALL - 0.2, title, fontsize=9.5, fontweight="bold", color=color, va="top")
    ax.text(x + 0.16, y + TALL - 0.75, text, fontsize=7.4, color=INK, va="top", linespacing=1.35)


def _arrow(ax: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    shape = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 1}
    ax.add_patch(FancyArrowPatch(begin, end, color=SOFT, linewidth=1.2, **shape))


def main() -> None:
    """Draws all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("demo"), help="folder of the digits report")
    parser.add_argument("--seed", type=int, default=0, help="seed it was made with")
    args = parser.parse_args()
    images = HERE / "images"
    images.mkdir(exist_ok=True)
    report = InfluenceReport.load(args.report)
    screenshot(report, args.seed, images / "report.png")
    alike(images / "alike.png")
    figures = {"digits": digits(report, args.seed), "flow": flow(), "tutorial": tutorial(), "fairness": fairness()}
    for name, figure in figures.items():
        figure.savefig(images / f"{name}.png", dpi=DPI, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
