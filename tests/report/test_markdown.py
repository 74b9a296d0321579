"""The summary for pull requests: complete, and foreign text in it stays text."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt  # comes with rich

from ine_callback.report import InfluenceReport, RunInfo, example_report
from ine_callback.report.markdown import escaped
from ine_callback.scores import QueryInfo

HOSTILE = "<img src=x onerror=y> | ![a](http://b) `c` **d** [e](http://f) @team #7 $g$ \x1b[31m\n# h\n- i"


class Page(HTMLParser):
    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(MarkdownIt("commonmark").enable("table").render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_has_headline_warnings_extremes_and_notes() -> None:
    report = example_report()
    page = Page(report.to_markdown())
    for part in (
        "60 rows · 59 observed · 1 never observed",
        "1 row was never observed",
        "3 atypical",
        "Synthetic example: nothing was trained.",
        "To look for label errors",
    ):
        assert part in page.text
    assert page.tags.count("table") == 1 + 2 * 3 and page.tags.count("h3") == 4
    one = report.top(1, "val")[0]
    assert f"| {one.row} | +{one.mu:.3f} |" in report.to_markdown()


def test_only_named_queries_are_shown_in_full() -> None:
    page = Page(example_report().to_markdown(["val"]))
    assert page.tags.count("table") == 3 and "2 more queries" in page.text
    with pytest.raises(KeyError, match="no query 'nope'"):
        example_report().to_markdown(["nope"])


def test_a_failed_null_check_comes_first() -> None:
    report = example_report()
    failed = InfluenceReport(replace(report.scores, null_ks_p=report.scores.null_ks_p * 0), report.run)
    assert failed.to_markdown().index("NULL CHECK FAILED") < failed.to_markdown().index("never observed and")


def test_foreign_text_stays_text() -> None:
    report = example_report()
    queries = tuple(QueryInfo(f"{HOSTILE}{kind}", kind, HOSTILE) for kind in ("self", "loss", "margin"))  # type: ignore[arg-type]
    named = {HOSTILE: HOSTILE}
    run = RunInfo(approximate=named, uncaptured=named, nonfinite={HOSTILE: 3}, notes=[HOSTILE, "# i", "1. j", "- k"])
    markdown = InfluenceReport(replace(report.scores, queries=queries), run).to_markdown()
    page, plain = Page(markdown), Page(report.to_markdown())
    allowed = {"h2", "h3", "p", "strong", "blockquote", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(page.tags) <= allowed
    assert page.tags.count("table") == plain.tags.count("table") and page.tags.count("h3") == plain.tags.count("h3")
    assert page.tags.count("ul") == 1 and page.tags.count("td") == plain.tags.count("td")
    # as in a terminal, a control character is a dot; all else is there to read
    assert HOSTILE.replace("\x1b", "·").replace("\n", " ") in page.text
    assert "@team" not in markdown and "#7" not in markdown and "\x1b" not in markdown


@pytest.mark.parametrize(
    "text", ["# a", "- a", "+ a", "1. a", "1) a", "= a", "a|b", "\\", "__init__", "a & b", "&lt;", " # a"]
)
def test_escaping_shows_the_text_itself(text: str) -> None:
    page = Page(f"- {escaped(text)}")
    assert set(page.tags) == {"ul", "li"} and page.text.strip() == text.strip()
