"""Sensitivity of the blocks of a network, on axes that the caller gives (see ``plots.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ine_callback.applications.layer_sensitivity import LayerSensitivity
from ine_callback.report.plots import FAINT, INK, dress
from ine_callback.utilities.words import BLUE, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TICKS = 32  # blocks named on the axis


def layers(found: LayerSensitivity, ax: Axes) -> None:
    """S of each block, from the network's input to its output, relative to the largest, on the first query."""
    values = found.scores[:, 0] / max(float(np.abs(found.scores[:, 0]).max()), np.finfo(float).tiny)
    places = np.arange(len(found))
    ax.bar(places, values, color=BLUE, width=0.7)
    ax.axhline(0.0, color=INK, linewidth=0.8)
    shown = places[:: -(-len(found) // MAX_TICKS)]
    ax.set_xticks(shown, [plain(found.blocks[k]) for k in shown], rotation=90 if len(found) > 8 else 0)
    title = f"Sensitivity of blocks: {plain(found.queries[0])}"
    dress(ax, title, "", "S relative to the largest   (higher: trained less)")
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
