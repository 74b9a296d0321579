"""``report.plot``: the plots of a report, on given axes or new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ine_callback.applications.fairness import NAME as FAIR
from ine_callback.applications.fairness import subspaces_of
from ine_callback.report import plots
from ine_callback.report.attribution_view import by_method
from ine_callback.report.effects_plot import draw, drawings
from ine_callback.report.effects_view import effects_in
from ine_callback.report.fairness_plot import fairness
from ine_callback.report.layer_plot import layers
from ine_callback.report.stages import stages
from ine_callback.utilities.optional import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ine_callback.report.contents import Contents


class Plots:
    """The plots of one query each; every method draws on ``ax`` (by default on a new figure) and returns it.

    Save with matplotlib: ``report.plot.volcano().figure.savefig("volcano.svg")``. Needs the extra ``report``.

    Args:
        report: Whose scores are drawn.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ine_callback.report import example_report
        >>> left, right = Figure().subplots(1, 2)
        >>> example_report().plot.volcano("val", ax=left) is left
        True
        >>> example_report().plot.extremes("val", k=3, ax=right).get_title(loc="left")
        'The extremes, with 95 % intervals'
    """

    def __init__(self, report: Contents) -> None:
        self._report = report

    def distribution(self, query: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Histogram of ``z = mu / null_sd`` over its permutation null: bars above the grey are beyond chance."""
        ax = _given(ax)
        plots.distribution(self._report, ax, query)
        return ax

    def volcano(self, query: str | None = None, q: float = plots.FLAG_AT, *, ax: Axes | None = None) -> Axes:
        """Score against ``-log10`` of its q-value; rows with q-value at most ``q`` in colour."""
        ax = _given(ax)
        plots.volcano(self._report, ax, query, q)
        return ax

    def extremes(self, query: str | None = None, k: int = 8, *, ax: Axes | None = None) -> Axes:
        """The ``k`` largest and ``k`` smallest scores with their 95 % intervals."""
        ax = _given(ax)
        plots.extremes(self._report, ax, query, k)
        return ax

    def stages(self, query: str | None = None, method: str | None = None, *, ax: Axes | None = None) -> Axes:
        """A method's scores of the extreme rows at each stage of training, with 95 % bands.

        Args:
            query: Name of the query.
            method: Name of the method; by default the first one that ran at several stages.
            ax: Axes to draw on.

        Raises:
            ValueError: If the method ran at fewer than two stages.
        """
        ax = _given(ax)
        methods = by_method(self._report.attributions)
        several = [name for name, found in methods.items() if len(found) > 1] or [*methods, ""]
        stages(methods.get(several[0] if method is None else method, []), ax, query)
        return ax

    def layers(
        self, query: str | None = None, method: str | None = None, blocks: str | None = None, *, ax: Axes | None = None
    ) -> Axes:
        """Sensitivity of each block of the network; arguments as in :meth:`.InfluenceReport.layers`."""
        ax = _given(ax)
        layers(self._report.layers(method, query, blocks), ax)
        return ax

    def fairness(self, *, ax: Axes | None = None) -> Axes:
        """What leaving the sensitive attribute's directions out costs: loss against the gaps, with 95 % intervals.

        Raises:
            ValueError: If :class:`~ine_callback.FairSubspaces` did not run.
        """
        ax = _given(ax)
        fairness(subspaces_of(self._report.attribution(FAIR)), ax)
        return ax

    def effects(self, *, ax: Axes | None = None) -> Axes:
        """Graphs that the report's causal effects rest on; under tiers with the probability of each edge.

        Raises:
            InfluenceError: If there are no effects.
        """
        ax = _given(ax)
        draw(drawings(effects_in(self._report.attributions))[0], ax)
        return ax


def _given(ax: Axes | None) -> Axes:
    if ax is None:
        ax = need("matplotlib.figure", "InfluenceReport.plot").Figure(layout="constrained").subplots()
    return ax
