"""The trade-off path of fair subspaces: on axes that the caller gives (see ``plots.py``), and as the page's image."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from ine_callback.applications.fairness import Subspaces
from ine_callback.report.plots import FAINT, INK, dress
from ine_callback.utilities.optional import need
from ine_callback.utilities.words import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Z95 = 1.96


def fairness(found: Subspaces, ax: Axes) -> None:
    """Loss against the gaps of each point of the path, with 95 % intervals; numbers are directions kept, and accuracy.

    Args:
        found: What a report holds.
        ax: Matplotlib's axes.
    """
    path = found.path
    loss, loss_se = (np.array([getattr(point, name) for point in path]) for name in ("loss", "loss_se"))
    for name, color, word in (("odds", ORANGE, "equalised-odds gap"), ("gap", BLUE, "parity gap")):
        x, se = (np.array([getattr(point, each) for point in path]) for each in (name, f"{name}_se"))
        ax.errorbar(
            x, loss, Z95 * loss_se, Z95 * se, color=color, marker="o", markersize=4.5, linewidth=1.4,
            elinewidth=0.8, alpha=0.9, label=word,
        )  # fmt: skip
    for k, point in enumerate(path):  # beside a falling line, by turns, since points gather at its end
        below = (len(path) - k) % 2 == 1 and k > 0
        shift, side = ((-6, -11), "right") if below else ((6, 6), "left")
        ax.annotate(
            f"keep {point.keep:.3g}: {point.accuracy:.0%}", (point.gap, point.loss), xytext=shift,
            textcoords="offset points", fontsize=7.5, color=INK, ha=side,
        )  # fmt: skip
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
    dress(ax, "What leaving the attribute out costs", "gap between groups", "loss")
    ax.grid(color=FAINT, linewidth=0.6)
    ax.legend(fontsize=7.5, frameon=False, loc="best")


def image(found: Subspaces) -> str:
    """The plot as an address that holds a PNG."""
    figure = need("matplotlib.figure", "InfluenceReport.write_html").Figure((6.4, 3.6), layout="constrained")
    fairness(found, figure.subplots())
    data = BytesIO()
    figure.savefig(data, format="png", dpi=140)
    return f"data:image/png;base64,{b64encode(data.getvalue()).decode('ascii')}"
