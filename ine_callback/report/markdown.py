"""The report as Markdown for pull requests and issues: headline, extreme rows, notes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ine_callback.report import alike
from ine_callback.report.effects_view import effects_assumptions, effects_tables, is_effects
from ine_callback.report.view import FLAG_AT, LEGEND, MAX_DETAILED, ROWS_PER_END, advice, headline, summary, warnings
from ine_callback.utilities.words import null_check, plain, tails

if TYPE_CHECKING:
    from ine_callback.report.contents import Contents
    from ine_callback.scores import Attribution

_MARKUP = re.compile(r"([\\`*_{}\[\]<>!|~&$])")
_PING = re.compile(r"([@#])(?=\w)")  # a forge would notify @someone and link #7
_LINK = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)  # nor is https://… to become a link


def markdown(report: Contents, queries: Iterable[str] | None = None) -> str:
    """See :meth:`InfluenceReport.to_markdown`."""
    facts = summary(report)
    names = list(report.queries[:MAX_DETAILED] if queries is None else queries)
    shown = [facts["queries"][report.column(name)] for name in names]
    parts = [
        "## Influence report",
        *([f"> **✗ {escaped(facts['incomplete'])}**"] if facts["incomplete"] else []),
        " · ".join(f"**{value}** {label}" for label, value in headline(facts)),
        *(escaped(line) for line in (advice(report, facts), *alike.lines(facts))),
        *(f"> **{'✗' if line.startswith('NULL') else '!'}** {escaped(line)}" for line in warnings(report, facts)),
        *([_overview(facts), escaped(LEGEND)] if facts["queries"] else []),
        *(part for query in shown for part in _extremes(report, query)),
    ]
    if len(shown) < len(report.queries):
        parts.append(f"Not shown in full: {len(report.queries) - len(shown)} more queries.")
    parts += [part for each in report.attributions if is_effects(each) for part in _effects(each)]
    if facts["notes"]:
        parts += ["### Notes", "\n".join(f"- {escaped(note)}" for note in facts["notes"])]
    return "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    r"""Foreign text as Markdown that shows it and does nothing else: no markup, HTML, mention or link, one line.

    Example:
        >>> print(escaped("a|b <img> *x* @team"))
        a\|b \<img\> \*x\* @<!-- -->team
    """
    line = plain(str(text).replace("\n", " "))
    line = _LINK.sub("<!-- -->", _PING.sub(r"\1<!-- -->", _MARKUP.sub(r"\\\1", line)))
    return re.sub(r"^(\s*)([-+=#]|\d+(?=[.)]))", _first, line)


def _first(found: re.Match[str]) -> str:
    """A mark that would begin a list or a heading, without its power."""
    blank, mark = found.groups()
    return f"{blank}{mark}<!-- -->" if mark.isdigit() else f"{blank}\\{mark}"


def _overview(facts: dict[str, Any]) -> str:
    head = ["query", "the question its column answers", f"q ≤ {FLAG_AT:g}: μ > 0", "μ < 0", "null check"]
    lines = []
    for query in facts["queries"]:
        ends, check = tails(query["kind"]), query["null_ks_p"]
        lines.append(
            [
                escaped(query["name"]),
                escaped(query["question"]),
                f"{query['helpful']:,} {ends.high}",
                f"{query['harmful']:,} {ends.low}",
                escaped(null_check(float("nan") if check is None else check)),
            ]
        )
    return table(head, lines, left=2)


def _extremes(report: Contents, query: dict[str, Any]) -> list[str]:
    ends, name = tails(query["kind"]), query["name"]
    parts = [f"### {escaped(name)}"]
    for rows, title in ((report.top(ROWS_PER_END, name), ends.upper), (report.bottom(ROWS_PER_END, name), ends.lower)):
        cells = rows.cells(ROWS_PER_END, compact=True)
        parts += [f"{title}:", table(cells.head, cells.body)]
    return parts


def _effects(found: Attribution) -> list[str]:
    """Estimates, and what they rest on."""
    parts = [f"### {escaped(found.title)}", *(f"> **✗** {escaped(reason)}" for reason in found.reasons)]
    for head, lines in effects_tables(found):
        parts.append(table(head, [[_cell(cell) for cell in line] for line in lines], left=1))
    assumed = effects_assumptions(found)
    return [*parts, escaped(found.legend), "\n".join(f"- {escaped(line)}" for line in assumed)]


def _cell(text: str) -> str:
    """Numbers are ours, names are foreign."""
    return escaped(text) if any(letter.isalpha() for letter in text) else text


def table(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 0) -> str:
    """A Markdown table of cells that are Markdown already; the first ``left`` columns are not set to the right.

    Example:
        >>> print(table(["query", "rows"], [["val", "3"]], left=1))
        | query | rows |
        | --- | ---: |
        | val | 3 |
    """
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))
