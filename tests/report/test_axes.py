"""``report.plot``: draws where it is told to, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from ine_callback.report import example_report, plots


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_plot_draws_on_the_axes_it_is_given(name: str) -> None:
    report, (left, right) = example_report(), Figure().subplots(1, 2)
    assert getattr(report.plot, name)("val", ax=left) is left
    expected = Figure().subplots()
    plots.PLOTS[name](report, expected, "val")
    assert left.get_title(loc="left") == expected.get_title(loc="left")
    assert left.get_xlim() == expected.get_xlim() and left.get_ylim() == expected.get_ylim()
    assert len(left.get_children()) == len(expected.get_children()) and not right.has_data()


def test_options_reach_the_plot() -> None:
    plot = example_report().plot
    assert len(plot.extremes("val", k=2).get_yticklabels()) == 4
    assert "q = 0.2" in {text.get_text() for text in plot.volcano("val", q=0.2).texts}
    assert "atypical" in plot.distribution("self").get_xlabel()


def test_matplotlib_saves_it(tmp_path: Path) -> None:
    for suffix in ("svg", "png"):
        example_report().plot.volcano().figure.savefig(tmp_path / f"a.{suffix}")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_axes_every_plot_has_a_figure_of_its_own() -> None:
    plot = example_report().plot
    one, other = plot.volcano(), plot.volcano()
    assert one.figure is not other.figure and np.isfinite(one.get_xlim()).all()
