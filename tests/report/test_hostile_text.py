"""Text from data sets and strangers' reports stays text: in HTML, in Markdown and in a terminal."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from ine_callback.methods.bif.scores import example_bif_scores
from ine_callback.report import InfluenceReport, RunInfo, example_report
from ine_callback.scores import Check, LayerScores, QueryInfo
from tests.helpers.report.hostile import PAYLOADS

ESCAPES = "\x1b[31mred\x1b[2J\x1b]0;owned\x07\x9b31m\x1b]8;;http://evil\x1b\\link\r\b\x00\u202egnp\u2028[red]x[/red][link=http://evil]y[/]"


def report_of(text: str) -> InfluenceReport:
    """A report with ``text`` wherever a report, its run and other methods have text."""
    example, found = example_report(), example_bif_scores()
    queries = tuple(QueryInfo(f"{k}{text}", kind, text) for k, kind in enumerate(("self", "loss", "margin")))  # type: ignore[arg-type]
    named = {text: text}
    run = RunInfo(
        config={text: [text, {text: text}], "combined": text, "initial_weights": text}, versions=named, started=text,
        approximate=named, uncaptured=named, nonfinite={text: 3}, schedule=named, notes=[text],
    )  # fmt: skip
    end = replace(
        found,
        queries=(QueryInfo(f"1{text}", "loss", text),),
        checks=(*found.checks, Check(text, 0.9, text, False, text)),
        settings={text: text},
        notes=(text,),
    )
    words = dict.fromkeys(("title", "headline", "legend"), text)
    column = np.arange(5.0)[:, None]
    other = replace(
        end, method=f"other{text}", columns={text: column, f"{text}_se": column}, ranked_by=text, arrays={text: column},
        layers=LayerScores((text, f"2{text}"), np.zeros((5, 2, 1))), **words,
    )  # fmt: skip
    stages = [replace(end, at=3), end, replace(other, at=1), other]
    return InfluenceReport(replace(example.scores, queries=queries, null_ks_p=np.zeros(3)), run, stages)


class Shape(HTMLParser):
    """The elements of a page with all their attributes, but for the two that hold text or a picture."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [(name, "" if name in ("alt", "src") else value) for name, value in attrs]))
        self.images += [str(value) for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", [(data, None)]))


VIEWS: dict[str, Callable[[InfluenceReport], str]] = {
    "notebook": lambda report: report._repr_html_(),
    "table": lambda report: report.top()._repr_html_(),
    "row": lambda report: report.row(59)._repr_html_(),
    "comparison": lambda report: report.compare(report)._repr_html_(),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_element_and_no_attribute_comes_from_data(payload: str) -> None:
    """The page of hostile text has exactly the elements and attributes of the page of harmless text."""
    hostile, harmless = report_of(PAYLOADS[payload]), report_of("harmless")
    for name, view in VIEWS.items():
        one, other = Shape(view(hostile)), Shape(view(harmless))
        assert one.elements == other.elements, name
        assert name == "row" or "".join(PAYLOADS[payload].split()) in "".join(one.text.split()), (
            name
        )  # lines are broken


def test_nor_in_the_html_report(tmp_path: Path) -> None:
    """All payloads at once, also as the rows' text, values and classes."""
    pages = []
    for text in ("".join(PAYLOADS.values()), "harmless"):
        report, samples = report_of(text), [(text, {text: text})[row % 2] for row in range(60)]
        labels = [f"{row % 3}{text}" for row in range(60)]
        pages.append(report.write_html(tmp_path / "r.html", None, samples, labels).read_text(encoding="utf-8"))
    one, other, text = *map(Shape, pages), "".join(PAYLOADS.values())
    assert one.elements == other.elements and one.text.count(text) > 20
    data, charts = (pages[0].split(f'id="{name}">')[1].split("</script>")[0] for name in ("data", "charts"))
    assert not set("<>&\u2028\u2029") & set(data + charts) and text in json.loads(data)["queries"][0]["name"]


@pytest.mark.parametrize("colors", [True, False])
def test_escape_codes_and_markup_do_not_reach_a_terminal(colors: bool) -> None:
    report = report_of(ESCAPES)
    console = Console(file=StringIO(), force_terminal=colors, color_system="truecolor" if colors else None, width=100)
    console.print(report, report.top(), report.row(3), report.compare(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    rest = re.sub(r"\x1b\[[\d;]*m", "", shown) if colors else shown  # colours are rich's own
    assert not {letter for letter in rest if not letter.isprintable()} - {"\n"}
    assert "[red]x[/red]" in rest and "evil" in rest


@pytest.mark.parametrize("text", ["https://evil.example", "http://evil.example/a?b", "www.evil.example", "ftp://a.b"])
def test_bare_addresses_in_markdown_are_no_links(text: str) -> None:
    """GitHub makes links of them without markup; a comment in between is not seen and stops that."""
    markdown = report_of(text).to_markdown()
    assert text not in markdown
    assert text in Shape(MarkdownIt("commonmark").enable("table").render(markdown)).text


def test_a_name_is_kept_whole_and_stored_once() -> None:
    """An array of fixed width would drop a last NUL, and need 4 bytes for each letter in each row."""
    assert report_of("\0").top(1)[0].query == "0\0"
    report = report_of("x" * 10**6)
    tracemalloc.start()
    report.top(50)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_text_that_is_no_unicode_is_spelled_out(tmp_path: Path) -> None:
    """Python shows a file name in another encoding as halves of surrogate pairs, which no file of text takes."""
    run = RunInfo(notes=["\udcff"], config={"\udcff": "\udcff"})
    found = InfluenceReport.load(InfluenceReport(example_report().scores, run).save(tmp_path))
    assert found.run == run and found.run.notes == ["\\udcff"] and found.run.config == {"\\udcff": "\\udcff"}
