"""Two reports of one training set beside each other: which findings repeat, and how alike the rankings are.

Of the rows that both runs scored, per query:

    rank correlation   Spearman's, of mu
    sign agreement     fraction of rows whose mu has the same sign; 1/2 for unrelated scores
    Jaccard of A, B    |A ∩ B| / |A ∪ B|; for the top fraction s of unrelated scores s / (2 - s) on average

Flagged sets are over all rows: a row that one run flagged and the other never observed is not repeated.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.attribution_combine import MethodAgreement
from ine_callback.report.attribution_combine import agreements as method_agreements
from ine_callback.report.attribution_view import moment
from ine_callback.report.combine import check_rows, differing_settings, flag_signs
from ine_callback.report.effects_view import effects_compared
from ine_callback.scores import Floats
from ine_callback.stats.ranks import spearman
from ine_callback.utilities.jsonable import jsonable
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.validate import listed, threshold
from ine_callback.utilities.words import MISSING, number, plain, signed

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from ine_callback.report.contents import Contents

WHO = "InfluenceReport.compare"
FRACTIONS = (0.01, 0.05, 0.10)
LEGEND = """\
Repeated: flagged by both with the same sign. Jaccard: shared rows / rows in
either set. Ranks: Spearman's correlation. Signs: fraction of rows whose signs agree.
Unrelated scores: Jaccard .01, .03, .05 at ends of 1, 5, 10 %; ranks 0; signs .5."""


@dataclass(frozen=True)
class Agreement:
    """How far two reports agree on one query.

    Attributes:
        query: Name of the query.
        scored: Number of rows that both reports scored.
        flagged: Number of rows that each report flagged.
        repeated: Rows that both flagged with the same sign, in order of row id.
        opposed: Rows that both flagged, with opposite signs.
        jaccard: Jaccard index of the flagged sets, signs left out; NaN when both are empty.
        top: Jaccard index of the 1, 5 and 10 % of rows with the largest scores.
        bottom: The same for the smallest scores.
        rank_correlation: Spearman's correlation of ``mu``; NaN with fewer than two different scores.
        sign_agreement: Share of rows whose ``mu`` has the same sign in both.
    """

    query: str
    scored: int
    flagged: tuple[int, int]
    repeated: tuple[int, ...]
    opposed: tuple[int, ...]
    jaccard: float
    top: tuple[float, ...]
    bottom: tuple[float, ...]
    rank_correlation: float
    sign_agreement: float

    @property
    def either(self) -> int:
        """Number of rows that at least one report flagged."""
        return sum(self.flagged) - len(self.repeated) - len(self.opposed)

    @property
    def nothing_repeats(self) -> bool:
        """Whether there are findings, and no finding is in both reports."""
        return self.either > 0 and not self.repeated


@dataclass(frozen=True)
class Comparison:
    """Two reports beside each other, as :meth:`InfluenceReport.compare` returns it; prints itself as a table.

    Attributes:
        agreements: One for every query that both reports have, in the order of the first.
        q: The q-value up to which rows are flagged.
        identical: Whether all scores of these queries are equal to the last bit.
        notes: Sentences for the reader.
        methods: One for every stage of a fit-end method and query that both reports have.
    """

    agreements: tuple[Agreement, ...]
    q: float
    identical: bool
    notes: tuple[str, ...]
    methods: tuple[MethodAgreement, ...] = ()

    def __getitem__(self, query: str) -> Agreement:
        for agreement in self.agreements:
            if agreement.query == query:
                return agreement
        choices = ", ".join(repr(each.query) for each in self.agreements)
        raise KeyError(f"Comparison: no query {query!r}; choose one of {choices}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; NaN is None."""
        fields: dict[str, Any] = jsonable(asdict(self), "comparison")
        return fields

    def __rich__(self) -> Group:
        return _view(self)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def compare(one: Contents, other: Contents, q: float) -> Comparison:
    """See :meth:`InfluenceReport.compare`."""
    check_rows([one.scores, other.scores], WHO)
    for report in (one, other):
        report.column()  # raises where f-INE scored no query
    limit = threshold(q, WHO)
    theirs = {query.name: query.kind for query in other.scores.queries}
    names = [query.name for query in one.scores.queries if theirs.get(query.name) == query.kind]
    if not names:
        raise ValueError(
            f"{WHO}: the reports have no query in common: {_listed(one.queries)} and {_listed(other.queries)}; "
            "give both runs a query of the same name and kind"
        )
    pairs = [_columns(one, other, name) for name in names]
    notes = [_only(where, report, names) for where, report in (("first", one), ("second", other))]
    if differing := differing_settings([one.run, other.run]):
        notes.append(f"The runs' settings differ ({', '.join(differing)}): not seeds alone tell them apart.")
    same = all(np.array_equal(here, there, equal_nan=True) for here, there in pairs)
    if same:
        notes.append("The scores are equal to the last bit: the same run, or its exact repetition.")
    notes += effects_compared(one.attributions, other.attributions)
    agreements = tuple(_agreement(one, other, name, limit) for name in names)
    methods = method_agreements(one.attributions, other.attributions)
    return Comparison(agreements, q, same, tuple(note for note in notes if note), methods)


def _columns(one: Contents, other: Contents, query: str) -> tuple[Floats, Floats]:
    return one.scores.mu[:, one.column(query)], other.scores.mu[:, other.column(query)]


def _agreement(one: Contents, other: Contents, query: str, q: float) -> Agreement:
    signs = flag_signs([one.scores, other.scores], query, q)
    both = signs[0] * signs[1]
    flagged = signs != 0
    here, there = _columns(one, other, query)
    scored = np.isfinite(here) & np.isfinite(there)
    here, there = here[scored], there[scored]
    return Agreement(
        query=query,
        scored=int(scored.sum()),
        flagged=(int(flagged[0].sum()), int(flagged[1].sum())),
        repeated=tuple(np.flatnonzero(both > 0).tolist()),
        opposed=tuple(np.flatnonzero(both < 0).tolist()),
        jaccard=_jaccard(flagged[0], flagged[1]),
        top=tuple(_jaccard(_first(-here, fraction), _first(-there, fraction)) for fraction in FRACTIONS),
        bottom=tuple(_jaccard(_first(here, fraction), _first(there, fraction)) for fraction in FRACTIONS),
        rank_correlation=spearman(here, there),
        sign_agreement=float(np.mean(np.sign(here) == np.sign(there))) if len(here) else math.nan,
    )


def _first(values: Floats, fraction: float) -> NDArray[np.bool_]:
    """Mask of the smallest values, a fraction of all and at least one; ties in order of row id."""
    mask = np.zeros(len(values), dtype=bool)
    mask[np.argsort(values, kind="stable")[: max(round(fraction * len(values)), 1)]] = True
    return mask


def _jaccard(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else math.nan


def _only(where: str, report: Contents, common: list[str]) -> str:
    missing = [name for name in report.queries if name not in common]
    return f"Only the {where} report has {_listed(missing)}." if missing else ""


def _listed(names: Any) -> str:
    return ", ".join(repr(plain(name)) for name in names)


def _view(found: Comparison) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = f"Two reports compared · flagged: q ≤ {found.q:g}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("query", style="bold", max_width=24, overflow="ellipsis")
    for name in ("flagged", "repeated", "Jaccard", "top 1 5 10 %", "bottom 1 5 10 %", "ranks", "signs"):
        table.add_column(name, justify="right")
    for each in found.agreements:
        cells = [
            f"{each.flagged[0]:,} and {each.flagged[1]:,}",
            f"{len(each.repeated):,} of {each.either:,}",
            number(each.jaccard, 2),
            *(" ".join(number(value, 2) for value in end) for end in (each.top, each.bottom)),
            signed(each.rank_correlation, 2),
            number(each.sign_agreement, 2),
        ]
        color = "red" if each.nothing_repeats else ""
        texts = [Text(cell, "dim" if cell == MISSING else color) for cell in cells]
        table.add_row(Text(plain(each.query)), *texts)
    parts: list[Any] = [table, Text(LEGEND, "dim")]
    for each in found.agreements:
        for word, rows, color in (("Repeated", each.repeated, ""), ("Opposed", each.opposed, "yellow")):
            if rows:
                parts.append(Text(f"{word}, {plain(each.query)}: row {listed(np.array(rows), 20)}", color))
    if found.methods:
        parts.append(_methods(found))
    return Group(*parts, *(Text(f"Note: {plain(note)}", "dim") for note in found.notes))


def _methods(found: Comparison) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Other methods", title_justify="left")
    for name in ("method", "query", "rows", "ranks", "top 5 %", "bottom 5 %", "checks passed"):
        table.add_column(name, justify="left" if name in ("method", "query") else "right")
    for each in found.methods:
        numbers = [signed(each.rank_correlation, 2), number(each.top, 2), number(each.bottom, 2)]
        passed = " and ".join("yes" if one else "no" for one in each.passed)
        cells = [f"{plain(each.method)}, {moment(each.at)}", plain(each.query), f"{each.scored:,}", *numbers, passed]
        table.add_row(*(Text(cell) for cell in cells))
    return table
