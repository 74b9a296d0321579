"""What a reader wants to know first: what to fix, what matters, and whether to believe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report import alike
from ine_callback.report.attribution_view import by_method, heading, verdict
from ine_callback.report.view import advice, unlike
from ine_callback.utilities.words import CLOSING, MEASURED, PREDICTED, SIZE, plain, tails

if TYPE_CHECKING:
    from ine_callback.report.contents import Contents

MAX_MATRIX = 20  # classes, and queries


@dataclass(frozen=True)
class Answer:
    """A question of the reader's, answered in a number or a word.

    Attributes:
        question: The question.
        short: The answer at a glance.
        tone: Its colour's name.
        lines: Sentences below.
        query: Name of the query to open for more.
    """

    question: str
    short: str
    tone: str
    lines: list[str]
    query: str | None = None


def answers(report: Contents, facts: dict[str, Any]) -> list[Answer]:
    """Three of them, the second of which needs a query; and what acts alike, where there is a gradient store.

    Example:
        >>> from ine_callback.report import example_report
        >>> report = example_report()
        >>> [answer.short for answer in answers(report, report.summary())]
        ['3 rows', '5 help · 3 harm', 'Yes, by its own checks']
    """
    if not facts["queries"]:
        return [Answer("What to fix", "No f-INE score", "ok", [advice(report, facts)]), _believe(report, facts)]
    return [_fix(report, facts), _matters(facts), *_alike(facts), _believe(report, facts)]


def _alike(facts: dict[str, Any]) -> list[Answer]:
    """Near duplicates and weak groups; nothing without a store."""
    found = facts["alike"]
    if found is None:
        return []
    tone = "good" if found["near_duplicates"] or found["weak_groups"] else "ok"
    return [Answer("What acts alike", alike.short(facts), tone, alike.lines(facts))]


def _fix(report: Contents, facts: dict[str, Any]) -> Answer:
    name, labels = facts["recommended_query"], facts["label_errors"]
    if labels is not None:
        return _labels(report, facts, labels)
    count = next(query["suspects"] for query in facts["queries"] if query["name"] == name)
    short = f"{count:,} row{'' if count == 1 else 's'}"
    self_query = report.info(name).kind == "self"
    what = "self-influence, so look at their labels" if self_query else "harm, so look at them"
    lines = [plain(f"Those that stand out (q ≤ {facts['flagged_at_q']:g} on {name!r}) by their {what}.")]
    lines = ["No row stands out."] if not count else lines
    return Answer("What to fix", short, "suspect" if count else "ok", [*lines, advice(report, facts)], name)


def _labels(report: Contents, facts: dict[str, Any], labels: dict[str, Any]) -> Answer:
    """Labels that are probably wrong; rows that merely stand out are a line below."""
    count = labels["listed"]
    short = f"{count:,} label{'' if count == 1 else 's'}"
    if count:
        lines = [f"Probably wrong: report.label_errors(), estimated false discovery rate ≤ {labels['q']:g}."]
    else:
        lines = [f"No label is listed as wrong at a false discovery rate of {labels['q']:g}."]
    lines += [labels["note"]] if labels["note"] else []
    lines += ["report.suspect_labels() ranks all rows.", unlike(report, facts)]
    return Answer("What to fix", short, "suspect" if count else "ok", lines, facts["recommended_query"])


def _matters(facts: dict[str, Any]) -> Answer:
    """Of the query that asks about predictions: a margin rather than a loss."""
    order = {"margin": 0, "loss": 1, "custom": 2, "self": 3}
    query = min(facts["queries"], key=lambda query: order[query["kind"]])
    ends = tails(query["kind"])
    verbs = ("help", "harm") if ends.suspect < 0 else (ends.high, ends.low)
    short = f"{query['helpful']:,} {verbs[0]} · {query['harmful']:,} {verbs[1]}"
    total = f"Rows flagged at q ≤ {facts['flagged_at_q']:g} of {query['scored']:,} with a score on {query['name']!r}."
    return Answer("What matters", short, "good", [plain(total), plain(query["question"])], query["name"])


def _believe(report: Contents, facts: dict[str, Any]) -> Answer:
    known = [query for query in facts["queries"] if query["null_ks_p"] is not None]
    failed, last = len(facts["null_checks_failed"]), [stages[-1] for stages in by_method(report.attributions).values()]
    checks = f"Null check passed for {len(known) - failed} of {len(known)} queries." if known else "No null check."
    lines = [checks, f"{100 * facts['captured_share']:.3g} % of the parameters captured."] if facts["queries"] else []
    for found in last:
        passed = sum(check.passed for check in found.checks)
        count = f" ({passed} of {len(found.checks)} checks)" if found.checks else ""
        lines.append(f"{heading(found)}: {verdict(found)}{count}.")
    if facts["incomplete"]:
        return Answer("Can I believe it?", "Not of the whole run", "alarm", [plain(facts["incomplete"]), *lines])
    sizes = [note for note in report.run.notes if note.startswith((SIZE, CLOSING))]
    lines += [plain(note[0].upper() + note[1:] + ".") for note in sizes]
    if failed or not all(found.reliable for found in last):
        return Answer("Can I believe it?", "Not all of it", "alarm", lines)
    if sizes:
        return Answer("Can I believe it?", "The ranking, not the size", "suspect", lines)
    if report.scores.unit is not None and not any(note.startswith(MEASURED) for note in report.run.notes):
        return Answer("Can I believe it?", "The ranking; sizes within a factor of 2", "ok", [*lines, PREDICTED])
    return Answer("Can I believe it?", "Yes, by its own checks" if known else "Not checked", "ok", lines)


def class_matrix(report: Contents, names: list[str], which: NDArray[np.int64]) -> dict[str, Any] | None:
    """Mean score of the rows of each class on the query of each class, where there are queries named ``…/class``."""
    keys = {name.partition(" ")[0]: name for name in names}
    of_classes = [(column, query) for column, query in enumerate(report.queries) if query.rpartition("/")[2] in keys]
    of_classes = [one for one in of_classes if "/" in one[1]][:MAX_MATRIX]
    shown = [k for k in range(len(names)) if (which == k).any()][:MAX_MATRIX]
    if len(of_classes) < 2 or not shown:
        return None
    mu = np.clip(report.scores.mu[:, [column for column, _ in of_classes]], -1e30, 1e30)
    scored = np.isfinite(mu)
    mean = np.full((len(shown), len(of_classes)), np.nan)
    for line, k in enumerate(shown):
        rows = (which == k)[:, None] & scored
        with np.errstate(invalid="ignore"):
            mean[line] = np.where(rows, mu, 0.0).sum(0) / rows.sum(0)
    largest = float(np.nanmax(np.abs(mean), initial=0.0)) or 1.0
    cells = [[{"mu": value, "width": round(abs(value) / largest, 3)} for value in line] for line in mean.tolist()]
    heads = [keys[query.rpartition("/")[2]] for _, query in of_classes]
    return {"head": heads, "lines": list(zip([names[k] for k in shown], cells, strict=True)), "largest": largest}
