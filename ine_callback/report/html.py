"""The report as one HTML file: our script and data that it draws; no network, every text from data stays text.

The page's policy lets run only the two scripts whose hashes it names, ours and Bokeh's, and nothing from data.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.applications.fairness import Subspaces, holds_subspaces
from ine_callback.report import alike, pagedata
from ine_callback.report import attribution_view as words_of
from ine_callback.report.answers import answers, class_matrix
from ine_callback.report.charts import charts, script
from ine_callback.report.effects_view import effects_section, is_effects
from ine_callback.report.fairness_plot import image
from ine_callback.report.pagedata import Classes, PageNeighbours, encoded, neighbours_of, payload
from ine_callback.report.samples import Render, Samples, classes, classes_of
from ine_callback.report.shown import Shown, Text
from ine_callback.report.view import FLAG_AT, ROWS_PER_END, advice, headline, summary, warnings
from ine_callback.utilities.optional import need
from ine_callback.utilities.words import ORANGE, decimals, null_check, plain, signed, tails

if TYPE_CHECKING:
    from ine_callback.report.contents import Contents
    from ine_callback.report.table import ScoreTable
    from ine_callback.scores import Attribution

MAX_TABS = 24  # queries with a tab, unless the caller names queries
MAX_DETAILED = 4  # queries with tables on a page without script
TABLE_ROWS = 10
CARDS_PER_END, MAX_CARDS = 8, 240  # rows shown as samples, at each end of a query and in total
MAX_ALIKE = 120  # further ones: near duplicates, weak groups and neighbours


def page(
    report: Contents,
    queries: Iterable[str] | None = None,
    samples: Any = None,
    labels: Any = None,
    render: Render | None = None,
) -> str:
    """The HTML document as text."""
    template = _template()
    policy, scripts = _scripts()
    names = list(report.queries[:MAX_TABS] if queries is None else queries)
    facts = summary(report)
    known = _classes(report, samples, labels)
    neighbours = neighbours_of(report, names)
    data = payload(report, facts, names, known, neighbours)
    shown, faults = _samples(report, names, samples, render, neighbours)
    marks = {row: _marks(report, names, row, one) for row, one in shown.items()}
    shown = {row: _with_terms(report, row, one) for row, one in shown.items()}
    combined = report.run.config.get("combined")
    text: str = template.render(
        policy=policy,
        scripts=scripts,
        style=_resource("report.css"),
        data=encoded(data),
        charts=encoded(charts()),
        facts=facts,
        flag_at=FLAG_AT,
        answers=answers(report, facts),
        headline=headline(facts),
        alarms=[line for line in warnings(report, facts) if line.startswith("NULL")],
        warnings=[line for line in warnings(report, facts) if not line.startswith("NULL")],
        overview=[query | {"ends": tails(query["kind"])} for query in facts["queries"]],
        names=names,
        sections=[_section(report, facts["queries"][report.column(name)]) for name in names[:MAX_DETAILED]],
        more=len(report.queries) - len(names),
        runs=f"{combined} runs" if combined else "one run",
        scatter=_scatter(report),
        classes=known,
        matrix=None if known is None else _matrix(report, *known),
        alike=None if report.alike is None else alike.section(report.alike),
        samples=shown,
        marks=marks,
        faults=faults,
        wide=" wide" if any(one.kind != "image" for one in shown.values()) else "",
        methods=[_method(report, stages) for stages in words_of.by_method(report.attributions).values()],
        run=_provenance(report),
    )
    return text


@lru_cache
def _template() -> Any:
    jinja2 = need("jinja2", "InfluenceReport.write_html")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ine_callback.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": plain,
        "signed": signed,
        "check": lambda p: null_check(float("nan") if p is None else p),
    }
    return environment.get_template("report.html.j2")


@lru_cache
def _scripts() -> tuple[str, tuple[str, str]]:
    """The content security policy, and the two scripts that it lets run."""
    both = (script(), _resource("plots.js") + _resource("report.js"))
    hashes = " ".join(f"'sha256-{b64encode(sha256(code.encode()).digest()).decode('ascii')}'" for code in both)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'"
    return f"{policy}; form-action 'none'", both


def _resource(name: str) -> str:
    return (files("ine_callback.report") / "templates" / name).read_text(encoding="utf-8")


def _classes(report: Contents, samples: Any, labels: Any) -> Classes | None:
    """Names of the classes and each row's class, as given, or from the data set."""
    if labels is None:
        return None if samples is None else classes_of(samples, report.rows)
    if len(labels) != report.rows:
        raise ValueError(
            f"InfluenceReport.write_html: {len(labels):,} labels for {report.rows:,} rows; give the class of each row"
        )
    return classes(labels)


def _samples(
    report: Contents, names: Sequence[str], samples: Any, render: Render | None, neighbours: PageNeighbours | None
) -> tuple[dict[int, Shown], list[str]]:
    """The rows that cards show, the suspects first, and rows alike; and in words which of them could not be read."""
    if samples is None or not report.queries:
        return {}, []
    wanted = report.drop_list()[: MAX_CARDS // 3].tolist()
    for name in sorted(names, key=lambda name: name != report.recommended_query):
        wanted += [*report.top(CARDS_PER_END, name).rows.tolist(), *report.bottom(CARDS_PER_END, name).rows.tolist()]
    wanted = list(dict.fromkeys(wanted))[:MAX_CARDS]
    near = [] if neighbours is None else neighbours.of(wanted)
    first = pagedata.NEIGHBOURS * CARDS_PER_END  # of the rows that a reader chooses first
    more = [*near[:first], *alike.rows_of(report.alike), *near[first:]]
    more = list(dict.fromkeys(row for row in more if row not in set(wanted)))[:MAX_ALIKE]
    found, faults = Samples(samples, render).read([*wanted, *more])
    lines = [f"Row {row} could not be shown: {why}" for row, why in list(faults.items())[:3]]
    lines += [f"… and {len(faults) - 3} more rows."] if len(faults) > 3 else []
    return found, lines


def _terms(report: Contents, row: int, one: Shown, query: str) -> NDArray[np.float64] | None:
    """Scores of a row's tokens on a query; None where there are none, or the tokens have weights of their own."""
    found = _of_tokens(report)
    if not isinstance(one, Text) or one.weights is not None or found is None or found.tokens is None:
        return None
    at, asked = np.flatnonzero(found.rows == row), [info.name for info in found.queries]
    if isinstance(one.tokens, str) or not at.size or query not in asked:
        return None
    scores = found.tokens.of(int(at[0]))
    return None if len(one.tokens) > len(scores) else np.nan_to_num(scores[: len(one.tokens), asked.index(query)])


def _of_tokens(report: Contents) -> Attribution | None:
    """The last attribution that has scores of tokens."""
    return next((each for each in reversed(report.attributions) if each.tokens is not None), None)


def _with_terms(report: Contents, row: int, one: Shown) -> Shown:
    """Tokens without weights get their scores on the query that a page without script shows."""
    found = _of_tokens(report)
    asked = [] if found is None else [info.name for info in found.queries]
    first = report.recommended_query if report.queries else ""
    query = first if first in asked else "".join(asked[:1])
    scores = _terms(report, row, one, query)
    return one if scores is None or not isinstance(one, Text) else replace(one, weights=scores.tolist())


def _marks(report: Contents, names: Sequence[str], row: int, one: Shown) -> list[str]:
    """Each token's scores on all queries of the page, scaled to [-1, 1] by query, as words that the script splits."""
    each = [_terms(report, row, one, name) for name in names]
    if all(scores is None for scores in each) or not isinstance(one, Text):
        return []
    scaled = [
        np.zeros(len(one.tokens)) if scores is None else scores / (float(np.abs(scores).max(initial=0.0)) or 1.0)
        for scores in each
    ]
    shown = [text for text, _ in one.pieces]
    count = len(shown) - (shown[-1:] == ["…"])  # the rest was cut off
    return [" ".join(f"{value:.3g}" for value in token) for token in np.stack(scaled, 1)[:count]]


def _matrix(report: Contents, names: list[str], which: NDArray[np.int64]) -> dict[str, Any] | None:
    found = class_matrix(report, names, which)
    return None if found is None else found | {"places": decimals([found["largest"]])}


def notebook(report: Contents) -> str:
    """A small HTML fragment for notebooks: headline, warnings, extreme rows. Needs no extra."""
    facts = summary(report)
    head = " · ".join(f"<b>{escape(value)}</b> {escape(label)}" for label, value in headline(facts))
    said = "<br>".join(map(escape, (advice(report, facts), *alike.lines(facts))))
    missed = f'<b style="color:#b00020">{escape(plain(facts["incomplete"]))}</b><br>' if facts["incomplete"] else ""
    parts = [f"<p><b>Influence report</b><br>{missed}{head}<br>{said}</p>"]
    for line in warnings(report, facts):
        color = "#b00020" if line.startswith("NULL") else "#9a6700"
        parts.append(f'<p style="color:{color}">{escape(line)}</p>')
    for query in facts["queries"][:4]:
        parts.append(f"<p><b>{escape(plain(query['name']))}</b>: {escape(plain(query['question']))}</p>")
        for rows in (report.top(ROWS_PER_END, query["name"]), report.bottom(ROWS_PER_END, query["name"])):
            parts.append(rows.html())
    parts += [f"<p>{escape(plain(note))}</p>" for note in facts["notes"]]
    return f"<div>{''.join(parts)}</div>"


def _section(report: Contents, query: dict[str, Any]) -> dict[str, Any]:
    """Tables for a page without script."""
    name, ends = query["name"], tails(query["kind"])
    upper, lower = report.top(TABLE_ROWS, name), report.bottom(TABLE_ROWS, name)
    longest = max((abs(one.mu) for one in [*upper[:1], *lower[:1]]), default=0.0) or 1.0  # bars of a query compare
    return query | {"tables": [_table(upper, ends.upper, longest), _table(lower, ends.lower, longest)]}


def _scatter(report: Contents) -> str:
    """What the scores' intervals come from."""
    if report.run.config.get("combined"):
        return "scatter between the runs"
    fixed = report.run.config.get("initial_weights") == "fixed"
    return "row's own visits" if fixed else "contrasts between each layer's units: it is about other trainings"


def _method(report: Contents, stages: Sequence[Attribution]) -> dict[str, Any]:
    """A fit-end method's section."""
    found = stages[-1]
    return {
        "heading": words_of.heading(found),
        "headline": words_of.headline(found),
        "verdict": words_of.verdict(found),
        "legend": words_of.legend(found),
        "earlier": words_of.earlier(stages),
        "head": words_of.head_of(found),
        "found": found,
        "subspaces": _subspaces(found),
        "effects": effects_section(found) if is_effects(found) else None,
        "sections": [
            {
                "name": query.name,
                "agreement": words_of.about(found, report.scores, query.name),
                "tables": words_of.ends(found, column, TABLE_ROWS),
            }
            for column, query in enumerate(found.queries[:MAX_DETAILED])
        ],
    }


def _subspaces(found: Attribution) -> dict[str, Any] | None:
    """The trade-off path of fair subspaces as a picture and in words."""
    if not holds_subspaces(found):
        return None
    held = Subspaces(found)
    return {"image": image(held), "lines": str(held)}


def _table(table: ScoreTable, title: str, longest: float) -> dict[str, Any]:
    """A table for the template; ``mark`` of a line is its score's tone, ``width`` its bar in per cent."""
    cells = table.cells(TABLE_ROWS)
    part = table[:TABLE_ROWS]
    marks = [
        {"tone": "suspect" if color == ORANGE else "good", "width": round(min(100.0, 100 * abs(one.mu) / longest))}
        for one, color in zip(part, cells.colors, strict=True)
    ]
    return {"title": title, "head": cells.head, "lines": list(zip(cells.body, marks, strict=True))}


def _provenance(report: Contents) -> list[tuple[str, str]]:
    facts = report.run.to_dict()
    facts.pop("notes")
    return [
        (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False))
        for name, value in facts.items()
        if value not in ("", {}, None)
    ]
