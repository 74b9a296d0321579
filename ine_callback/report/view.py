"""The report in a terminal: headline, what each query asks, its extreme rows, warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ine_callback.applications.label_errors import knows_labels
from ine_callback.report import alike
from ine_callback.report.attribution_view import by_method, section
from ine_callback.utilities.words import BLUE, NULL_ALARM, null_check, plain, tails

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ine_callback.report.contents import Contents

FLAG_AT = 0.05
MAX_DETAILED = 4  # queries shown with their rows; the others are in the overview
ROWS_PER_END = 5
ON_CLEAN_DATA = 0.01, 0.15  # fraction of the rows that self-influence's test lists there (docs/methods/label-errors.md)
LEGEND = """\
μ > 0: training on the row lowers the query. μ is in standard deviations of training noise;
q is the false discovery rate; the mean loss is the free baseline for label errors."""


def summary(report: Contents) -> dict[str, Any]:
    """See :meth:`InfluenceReport.summary`."""
    queries = [_query_summary(report, index) for index in range(len(report.queries))]
    run = report.run
    unseen = int(report.unseen.size)
    return {
        "incomplete": run.incomplete,
        "rows": report.rows,
        "seen": report.rows - unseen,
        "unseen": unseen,
        "steps": run.steps,
        "captured_share": run.captured_share,
        "flagged_at_q": FLAG_AT,
        "recommended_query": report.recommended_query if report.queries else None,
        "null_checks_failed": [query["name"] for query in queries if _nan(query["null_ks_p"]) < NULL_ALARM],
        "label_errors": _labels(report),
        "alike": alike.facts_of(report.store, report.alike),
        "queries": queries,
        "notes": list(run.notes),
    }


def _labels(report: Contents) -> dict[str, Any] | None:
    """The list of label errors in numbers; None where the run could not tell them."""
    if not knows_labels(report.scores):
        return None
    found = report.label_errors()
    return {
        "listed": len(found),
        "q": found.q,
        "rate": found.rate if len(found) else None,
        "noise": None if np.isnan(found.noise) else found.noise,
        "note": found.note,
    }


def _query_summary(report: Contents, column: int) -> dict[str, Any]:
    scores, query = report.scores, report.scores.queries[column]
    mu = scores.mu[:, column]
    flagged = scores.q[:, column] <= FLAG_AT
    check = float(scores.null_ks_p[column])
    return {
        "name": query.name,
        "kind": query.kind,
        "question": query.question,
        "scored": int(np.isfinite(mu).sum()),
        "helpful": int((flagged & (mu > 0)).sum()),
        "harmful": int((flagged & (mu < 0)).sum()),
        "suspects": int((flagged & (mu * tails(query.kind).suspect > 0)).sum()),
        "null_ks_p": check if np.isfinite(check) else None,
    }


def headline(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline as pairs of a label and a value."""
    pairs = [("rows", f"{facts['rows']:,}"), ("observed", f"{facts['seen']:,}")]
    if facts["unseen"]:
        pairs.append(("never observed", f"{facts['unseen']:,}"))
    pairs.append(("steps", f"{facts['steps']:,}"))
    if facts["queries"]:  # else nothing was to be captured
        pairs.append(("parameters captured", f"{100 * facts['captured_share']:.3g} %"))
    return pairs


def warnings(report: Contents, facts: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the scores, most serious first."""
    run, lines = report.run, []
    for name in facts["null_checks_failed"]:
        lines.append(
            f"NULL CHECK FAILED for {plain(name)!r}: p- and q-values of this query are not calibrated; "
            "trust neither flags nor drop lists, only the ranking."
        )
    if facts["unseen"]:
        count = facts["unseen"]
        lines.append(f"{count:,} row{'s were' if count > 1 else ' was'} never observed and not scored (report.unseen).")
    return (
        lines
        + _nonfinite(run.nonfinite)
        + _modules(run.uncaptured, "left out")
        + _modules(run.approximate, "approximate")
    )


def _nonfinite(counts: dict[str, int], limit: int = 3) -> list[str]:
    lost = {name: count for name, count in counts.items() if count}
    lines = [f"{count:,} non-finite signals of {plain(name)!r} were left out." for name, count in lost.items()]
    if len(lines) <= limit:
        return lines
    return [*lines[:limit], f"… and non-finite signals of {len(lost) - limit:,} more queries (report.run.nonfinite)."]


def _modules(reasons: dict[str, str], state: str, limit: int = 5) -> list[str]:
    lines = [f"{plain(name)} is {state}: {plain(why)}" for name, why in list(reasons.items())[:limit]]
    hidden = len(reasons) - limit
    return lines + ([f"… and {hidden:,} more modules are {state} (report.run)."] if hidden > 0 else [])


def advice(report: Contents, facts: dict[str, Any]) -> str:
    """Where to look for label errors, and how strongly that is recommended."""
    losses = bool(np.isfinite(report.scores.mean_loss).any())
    labels = "report.suspect_labels() ranks rows by their mean loss" if losses else ""
    unasked = "" if facts["queries"] else "No query was scored by f-INE. "
    if facts["label_errors"] is not None:
        return f"{unasked}To look for label errors: {_listed(facts['label_errors'])} {unlike(report, facts)}".rstrip()
    name = facts["recommended_query"]
    if name is None:
        return f"No query was scored by f-INE.{f' To look for label errors: {labels}.' if labels else ''}"
    kind = report.info(name).kind
    count = next(query["suspects"] for query in facts["queries"] if query["name"] == name)
    found = f"{count:,} row{'' if count == 1 else 's'} at q ≤ {FLAG_AT:g}"
    where = f"report.drop_list(), query {plain(name)!r}: {found}."
    if kind == "self":
        return (
            f"To look for label errors: {labels + '. ' if labels else ''}Rows unlike their batch-mates: {where} "
            f"{_on_clean_data(facts)}"
        )
    return f"To look for harmful rows: {where}{f' For label errors: {labels}.' if labels else ''}"


def _listed(found: dict[str, Any]) -> str:
    count = found["listed"]
    rows = f"{count:,} label{'' if count == 1 else 's'}" if count else "no label"
    note = f" {found['note']}" if found["note"] else ""
    return (
        f"report.label_errors() lists {rows} as probably wrong (estimated false discovery rate "
        f"≤ {found['q']:g}).{note} report.suspect_labels() ranks all rows."
    )


def _on_clean_data(facts: dict[str, Any]) -> str:
    few, many = (round(fraction * facts["seen"]) for fraction in ON_CLEAN_DATA)
    return f"On clean data this test lists 1 to 15 % of the rows, here {few:,} to {many:,}."


def unlike(report: Contents, facts: dict[str, Any]) -> str:
    """How many rows the recommended query's test lists, and how many clean data would give."""
    name = facts["recommended_query"]
    if name is None:
        return ""
    count = next(query["suspects"] for query in facts["queries"] if query["name"] == name)
    rows = f"{count:,} row{'' if count == 1 else 's'}"
    clean = f" {_on_clean_data(facts)}" if report.info(name).kind == "self" else ""
    return (
        f"Rows unlike their batch-mates (report.unlike_batch_mates(), query {plain(name)!r}): {rows} at q ≤ "
        f"{FLAG_AT:g}.{clean}"
    )


def one_line(report: Contents) -> str:
    """What ``repr`` says."""
    names = ", ".join(repr(plain(name)) for name in report.queries[:5]) + (", …" if len(report.queries) > 5 else "")
    asked = f"queries: {names}" if names else "no query"
    missing = report.unseen.size
    note = f"; {missing:,} row{'s' if missing > 1 else ''} never observed" if missing else ""
    missed = f"; {plain(report.run.incomplete)}" if report.run.incomplete else ""
    return f"InfluenceReport({report.rows:,} rows, {asked}{note}{missed})"


def terminal(report: Contents) -> Group:
    """See :class:`InfluenceReport`: what ``rich`` prints."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    facts = summary(report)
    alarms = warnings(report, facts)
    failed = bool(facts["null_checks_failed"])
    missed = facts["incomplete"]
    head = [Text(plain(missed), "bold white on red")] if missed else []
    head += [Text(" · ").join(Text.assemble((value, "bold"), f" {label}") for label, value in headline(facts))]
    head += [Text(line) for line in (advice(report, facts), *alike.lines(facts))]
    parts: list[Any] = [
        Panel(
            Group(*head), title="Influence report", title_align="left", border_style="red" if failed or missed else BLUE
        )
    ]
    parts += [_alarm(line) for line in alarms]
    if facts["queries"]:
        parts += [_overview(facts), Text(LEGEND, "dim")]
    for query in facts["queries"][:MAX_DETAILED]:
        parts += _extremes(report, query)
    if len(facts["queries"]) > MAX_DETAILED:
        parts.append(Text(f"… and {len(facts['queries']) - MAX_DETAILED} more queries: report.top(query=…)", "dim"))
    for stages in by_method(report.attributions).values():
        parts += section(stages, report.scores)
    parts += [Text(f"Note: {plain(note)}", "dim") for note in facts["notes"]]
    return Group(*parts)


def _alarm(line: str) -> Text:
    from rich.text import Text

    loud = "bold white on red" if line.startswith("NULL") else "yellow"
    return Text(f" {'✗' if line.startswith('NULL') else '!'} {line}", loud)


def _overview(facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("query", no_wrap=True, style="bold", max_width=24, overflow="ellipsis")
    table.add_column("the question its column answers")
    for name in (f"q ≤ {FLAG_AT:g}: μ > 0", "μ < 0"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("null check", no_wrap=True)
    for query in facts["queries"]:
        ends, check = tails(query["kind"]), null_check(_nan(query["null_ks_p"]))
        table.add_row(
            Text(plain(query["name"])),
            Text(plain(query["question"])),
            Text(f"{query['helpful']:,} {ends.high}", ends.color(1.0)),
            Text(f"{query['harmful']:,} {ends.low}", ends.color(-1.0)),
            Text(check, "bold red" if check.startswith("FAILED") else "green" if check.startswith("passed") else "dim"),
        )
    return table


def _extremes(report: Contents, query: dict[str, Any]) -> list[Any]:
    from rich.columns import Columns
    from rich.rule import Rule
    from rich.text import Text

    ends = tails(query["kind"])
    sides = [
        (report.top(ROWS_PER_END, query["name"]), ends.upper, 1.0),
        (report.bottom(ROWS_PER_END, query["name"]), ends.lower, -1.0),
    ]
    tables = []
    for rows, title, sign in sides:
        table = rows.render(ROWS_PER_END, compact=True)
        table.title, table.title_style = Text(title), f"bold {ends.color(sign)}"
        tables.append(table)
    return [Rule(Text(plain(query["name"]), "bold"), align="left", style="dim"), Columns(tables, padding=(0, 3))]


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
