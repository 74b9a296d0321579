"""Plots and HTML: complete, self-contained, escaped, and without side effects on matplotlib."""

from __future__ import annotations

import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import ine_callback
from ine_callback.methods.bif.scores import example_bif_scores
from ine_callback.report import InfluenceReport, example_report, plots
from ine_callback.scores import Check
from ine_callback.utilities.words import BLUE, ORANGE
from tests.helpers.report.hostile import HOSTILE, hostile

ROOT = Path(next(iter(ine_callback.__path__))).parent  # so that a fresh interpreter finds an uninstalled package


class Tags(HTMLParser):
    """Collects tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_html_is_one_file_with_its_own_scripts_alone(tmp_path: Path) -> None:
    path = example_report().write_html(tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    tags = Tags(text)
    assert [tag.get("type") for tag in tags.of("script")] == ["application/json", "application/json", None, None]
    assert not any("src" in tag for tag in tags.of("script")) and not tags.of("link") and not tags.of("img")
    (policy,) = (str(tag["content"]) for tag in tags.of("meta") if "http-equiv" in tag)
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe-eval" not in policy
    codes = [part.split("</script>")[0] for part in text.split("<script>")[1:]]
    assert [f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'" in policy for code in codes] == [True] * 2
    for part in ("Which rows lower the mean loss", "Synthetic example", "1.6 % of the parameters", "light-dark("):
        assert part in text
    assert [name.name for name in path.parent.iterdir()] == ["report.html"]


def test_without_script_the_page_has_its_tables(tmp_path: Path) -> None:
    text = example_report().write_html(tmp_path / "r.html").read_text(encoding="utf-8")
    static = text.split("<noscript>")[2].split("</noscript>")[0]
    assert static.count("<table>") == 6 and "<h2>val margin</h2>" in static and "<td>17</td>" in static


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    report = hostile()
    for text in (
        report.write_html(tmp_path / "r.html").read_text(encoding="utf-8"),
        report._repr_html_(),
        report.top()._repr_html_(),
        report.row(0)._repr_html_(),
    ):
        tags = Tags(text)
        assert len(tags.of("script")) == 4 * text.startswith("<!doctype")
        assert all(not str(image["src"]).startswith("x") for image in tags.of("img"))
        assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
        assert "&lt;script&gt;" in text
        assert "49" not in text or "{{ 7*7 }}" in text
    report.figure().savefig(tmp_path / "hostile.png")  # "$\frac{" in a name is text, not mathematics


def test_failed_null_check_and_unseen_rows_are_loud_in_html(tmp_path: Path) -> None:
    text = hostile().write_html(tmp_path / "r.html", queries=[]).read_text(encoding="utf-8")
    assert [notice.get("role") for notice in Tags(text).of("div")].count("alert") == 3
    assert "NULL CHECK FAILED" in text and "1 row was never observed" in text


def test_only_named_queries_are_shown_in_full(tmp_path: Path) -> None:
    text = example_report().write_html(tmp_path / "r.html", queries=["val"]).read_text(encoding="utf-8")
    tabs = [tag for tag in Tags(text).of("button") if tag.get("role") == "tab"]
    assert len(tabs) == 1 and "2 more queries" in text
    with pytest.raises(KeyError, match="no query 'nope'"):
        example_report().write_html(tmp_path / "r.html", queries=["nope"])


@pytest.mark.parametrize("query", ["self", "val", "val margin"])
@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_name_the_sign_and_keep_matplotlib_as_it_was(name: str, query: str) -> None:
    before = dict(rcParams)
    figure = Figure()
    ax = figure.subplots()
    plots.PLOTS[name](example_report(), ax, query)
    figure.canvas.draw()
    label = ax.get_xlabel()
    assert label.startswith("←") and label.endswith("→")
    assert ("typical" in label) if query == "self" else ("harmful" in label and label.endswith("helpful →"))
    assert dict(rcParams) == before


def test_no_pyplot_and_no_matplotlib_on_import() -> None:
    code = (
        "import sys, ine_callback.report as r\n"
        "had = 'matplotlib.pyplot' in sys.modules\n"  # the rest of the package may have brought it
        "r.example_report().figure()\n"
        "assert had or 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_volcano_colours_flagged_rows_by_side() -> None:
    report, ax = example_report(), Figure().subplots()
    plots.volcano(report, ax, "val margin")
    flagged = report.flagged(query="val margin")
    for color, sign in ((ORANGE, -1), (BLUE, 1)):
        dots = [each for each in ax.collections if same_color(each.get_facecolor()[0, :3], color)]
        expected = sorted(one.mu for one in flagged if np.sign(one.mu) == sign)
        np.testing.assert_allclose(np.sort(np.asarray(dots[0].get_offsets())[:, 0]), expected)
    named = {text.get_text() for text in ax.texts}
    assert {"3", "17", "29"} <= named


def test_histogram_is_a_density_over_the_null() -> None:
    report, ax = example_report(400), Figure().subplots()
    plots.distribution(report, ax, "val")
    null, low, high = (patch.get_data() for patch in ax.patches)
    assert np.sum(null.values * np.diff(null.edges)) == pytest.approx(1.0)
    assert sum(np.sum(half.values * np.diff(half.edges)) for half in (low, high)) == pytest.approx(1.0)
    mu = report.scores.mu[:, 1]
    assert np.sum(low.values * np.diff(low.edges)) == pytest.approx(np.mean(mu[np.isfinite(mu)] < 0))


def test_extremes_of_a_small_report_show_each_row_once() -> None:
    report, ax = example_report(12), Figure().subplots()
    plots.extremes(report, ax, "val")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(names) == len(set(names)) == 11
    assert names[-1] == f"row {report.top(1, 'val').rows[0]}" and names[0] == f"row {report.bottom(1, 'val').rows[0]}"


def test_missing_extra_names_the_remedy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from ine_callback.report import example_report\n"
        "extra = {'jinja2', 'matplotlib', 'pandas', 'bokeh'}\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] in extra]: del sys.modules[name]\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in extra: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "report = example_report()\n"
        "str(report), report._repr_html_(), report.save(sys.argv[1])\n"
        "for call in (report.to_pandas, report.top().to_pandas, report.figure, lambda: report.write_html('x.html')):\n"
        "    try: call()\n"
        "    except ImportError as error: assert 'pip install \"ine_callback[report]\"' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)


def test_chains_have_a_section_that_says_whether_to_believe_them(tmp_path: Path) -> None:
    report, found = example_report(), example_bif_scores()
    healthy = InfluenceReport(report.scores, report.run, [found]).write_html(tmp_path / "a.html").read_text("utf-8")
    assert "Bayesian influence" in healthy and "all checks passed" in healthy and "UNRELIABLE" not in healthy
    assert "rank agreement with μ" in healthy and "<td>+0.9</td>" in healthy
    failed = replace(found, checks=(*found.checks, Check(HOSTILE, 0.9, HOSTILE, False, HOSTILE)), notes=(HOSTILE,))
    text = InfluenceReport(report.scores, report.run, [failed]).write_html(tmp_path / "b.html").read_text("utf-8")
    assert 'role="alert">UNRELIABLE: do not use this ranking' in text
    assert text.count("<script") == 4 and "onerror=y>" not in text and "&lt;script&gt;" in text
    assert "Bayesian influence" not in example_report().write_html(tmp_path / "c.html").read_text("utf-8")
