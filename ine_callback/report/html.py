"""The report as one static HTML file: no scripts, no network, every text from data escaped."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ine_callback.report import bif_plots, bif_view, plots
from ine_callback.report.files import replace_file
from ine_callback.report.optional import need
from ine_callback.report.view import EXTREMES, FLAG_AT, advice, headline, warnings
from ine_callback.report.words import ORANGE, null_check, plain, tails

if TYPE_CHECKING:
    from ine_callback.bif.scores import BIFScores
    from ine_callback.report.report import InfluenceReport
    from ine_callback.report.table import ScoreTable

DETAILED = 4  # queries shown with plots and tables unless the caller names them
LISTED, FLAGGED = 10, 100
_ALT = {
    "distribution": "Histogram of the scores over their permutation null",
    "volcano": "Scores against the negative logarithm of their q-values",
    "extremes": "The most extreme rows with 95 % intervals",
}


def write_html(report: InfluenceReport, path: Path, queries: Iterable[str] | None = None) -> Path:
    """Writes :func:`page` to ``path``."""
    return replace_file(path, page(report, queries).encode())


def page(report: InfluenceReport, queries: Iterable[str] | None = None) -> str:
    """The HTML document as text."""
    jinja2 = need("jinja2", "InfluenceReport.write_html")
    need("matplotlib", "InfluenceReport.write_html")
    names = list(report.queries[:DETAILED] if queries is None else queries)
    facts = report.summary()
    combined = report.run.config.get("combined")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ine_callback.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "check": lambda p: null_check(float("nan") if p is None else p)}
    text: str = environment.get_template("report.html.j2").render(
        facts=facts,
        flag_at=FLAG_AT,
        headline=headline(facts),
        advice=advice(report, facts),
        warnings=warnings(report, facts),
        overview=[query | {"ends": tails(query["kind"])} for query in facts["queries"]],
        sections=[_section(report, facts["queries"][report.column(name)]) for name in names],
        more=len(report.queries) - len(names),
        runs=f"{combined} runs" if combined else "one run",
        scatter=_scatter(report),
        chains=None if report.bif is None else _chains(report, report.bif),
        run=_provenance(report),
    )
    return text


def notebook(report: InfluenceReport) -> str:
    """A small HTML fragment for notebooks: headline, warnings, extreme rows. Needs no extra."""
    facts = report.summary()
    head = " · ".join(f"<b>{escape(value)}</b> {escape(label)}" for label, value in headline(facts))
    parts = [f"<p><b>Influence report</b><br>{head}<br>{escape(advice(report, facts))}</p>"]
    for line in warnings(report, facts):
        color = "#b00020" if line.startswith("NULL") else "#9a6700"
        parts.append(f'<p style="color:{color}">{escape(line)}</p>')
    for query in facts["queries"][:4]:
        parts.append(f"<p><b>{escape(plain(query['name']))}</b>: {escape(plain(query['question']))}</p>")
        for rows in (report.top(EXTREMES, query["name"]), report.bottom(EXTREMES, query["name"])):
            parts.append(rows.html())
    parts += [f"<p>{escape(plain(note))}</p>" for note in facts["notes"]]
    return f"<div>{''.join(parts)}</div>"


def _section(report: InfluenceReport, query: dict[str, Any]) -> dict[str, Any]:
    name, ends = query["name"], tails(query["kind"])
    flagged = report.flagged(FLAG_AT, name)
    more = f" (the first {FLAGGED} of {len(flagged):,})" if len(flagged) > FLAGGED else f" ({len(flagged):,})"
    upper, lower = report.top(LISTED, name), report.bottom(LISTED, name)
    longest = max((abs(one.mu) for one in [*upper[:1], *lower[:1]]), default=0.0) or 1.0  # bars of a query compare
    return query | {
        "plots": [
            {
                "name": plot,
                "alt": f"{_ALT[plot]}, query {plain(name)}",
                "data": _data_uri(plots.svg(plot, report, name)),
            }
            for plot in plots.PLOTS
        ],
        "tables": [_table(upper, ends.upper, longest), _table(lower, ends.lower, longest)],
        "flagged": _table(flagged, f"All flagged rows, q ≤ {FLAG_AT:g}{more}", longest, FLAGGED),
    }


def _scatter(report: InfluenceReport) -> str:
    """What the scores' intervals come from."""
    if report.run.config.get("combined"):
        return "scatter between the runs"
    fixed = report.run.config.get("initial_weights") == "fixed"
    return "row's own visits" if fixed else "contrasts between each layer's units: it is about other trainings"


def _chains(report: InfluenceReport, found: BIFScores) -> dict[str, Any]:
    return {
        "headline": bif_view.headline(found),
        "verdict": bif_view.verdict(found),
        "legend": bif_view.legend(found),
        "earlier": bif_view.earlier(report.bif_stages),
        "head": bif_view.HEAD,
        "found": found,
        "sections": [
            {
                "name": query.name,
                "agreement": bif_view.agreement(found, report.scores, query.name),
                "tables": bif_view.ends(found, column, LISTED),
                "course": _course(report, query.name),
            }
            for column, query in enumerate(found.queries[:DETAILED])
        ],
    }


def _course(report: InfluenceReport, query: str) -> dict[str, str] | None:
    """The plot over the stages of training, where there are several."""
    if len(report.bif_stages) < 2:
        return None
    alt = f"Bayesian influence of the extreme rows at each stage of training, query {plain(query)}"
    return {"alt": alt, "data": _data_uri(bif_plots.svg(report, query))}


def _table(table: ScoreTable, title: str, longest: float, limit: int = LISTED) -> dict[str, Any]:
    """A table for the template; ``mark`` of a line is its score's tone, ``width`` its bar in per cent."""
    cells = table.cells(limit)
    part = table[:limit]
    marks = [
        {"tone": "suspect" if color == ORANGE else "good", "width": round(min(100.0, 100 * abs(one.mu) / longest))}
        for one, color in zip(part, cells.colors, strict=True)
    ]
    return {"title": title, "head": cells.head, "lines": list(zip(cells.body, marks, strict=True))}


def _data_uri(image: bytes) -> str:
    return f"data:image/svg+xml;base64,{b64encode(image).decode('ascii')}"


def _provenance(report: InfluenceReport) -> list[tuple[str, str]]:
    facts = report.run.to_dict()
    facts.pop("notes")
    return [
        (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False))
        for name, value in facts.items()
        if value not in ("", {}, None)
    ]
