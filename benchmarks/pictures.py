"""Pictures of the measurements, for RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OURS, PEERS = "#1b6ca8", "#9aa5b1"


def lds(results: dict[str, Any], file: Path) -> None:
    """LDS of the margin queries for each problem; of a method's dampings the best one, as no user could choose it."""
    from matplotlib.figure import Figure

    problems = list(results["problems"])
    figure = Figure(figsize=(9, 0.6 + 2.9 * -(-len(problems) // 2)), layout="constrained")
    for place, problem in enumerate(problems):
        ax = figure.add_subplot(-(-len(problems) // 2), min(2, len(problems)), place + 1)
        best: dict[str, float] = {}
        for row in results["rows"]:
            if row["protocol"] == problem and "lds_margin" in row:
                name, _, damped = row["name"].partition(", damping")
                name += ", best damping" if damped else ""
                best[name] = max(best.get(name, -1.0), row["lds_margin"])
        names = sorted(best, key=lambda name: best[name])
        colors = [OURS if name.startswith("ine_callback") else PEERS for name in names]
        bars = ax.barh(names, [best[name] for name in names], color=colors, height=0.7)
        ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        ax.set_title(problem, fontsize=10, loc="left", fontweight="bold")
        ax.tick_params(labelsize=7, length=0)
        ax.set_xlim(min(0, *best.values()), 1.15 * max(best.values()))
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.set_xticks([])
    figure.suptitle("Linear data-modelling score, margin queries (higher is better)", fontsize=11)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)


def randomness(results: dict[str, Any], file: Path) -> None:
    """Agreement of one run with the multi-run mean, and coverage, for each setting and query."""
    from matplotlib.figure import Figure

    settings = results["settings"]
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(settings)), layout="constrained")
    shown = {
        "spearman_mean_of_others": "Spearman of one run with the others' mean",
        "coverage": "coverage of 95 % intervals",
    }
    for place, (key, title) in enumerate(shown.items()):
        ax = figure.add_subplot(1, 2, place + 1)
        for k, query in enumerate(next(iter(settings.values()))):
            found = np.array([queries[query][key] for queries in settings.values()])
            y = np.arange(len(settings))[::-1] + 0.2 * (1 - k)
            ax.errorbar(found[:, 0], y, xerr=found[:, 1], fmt="o", markersize=4, linewidth=1, label=query)
        ax.set_yticks(
            np.arange(len(settings))[::-1], list(settings) if place == 0 else [""] * len(settings), fontsize=8
        )
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.3)
        if key == "coverage":
            ax.axvline(0.95, color="#c0392b", linewidth=1, linestyle="--")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"lds": lds, "randomness": randomness}
