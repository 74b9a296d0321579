"""Some rows of a report: an immutable sequence that prints itself in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ine_callback.utilities.optional import need
from ine_callback.utilities.terminal import SHOWN, as_text
from ine_callback.utilities.words import MISSING, decimals, number, plain, probability, signed, tails

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


class RowScore(NamedTuple):
    """One row's score on one query; ``mu > 0``: training on the row lowers the query (helpful).

    Attributes:
        row: Dataset index.
        query: Name of the query.
        mu: Gaussian influence, in standard deviations of training randomness; NaN when never observed.
        se: Standard error of ``mu`` within the run.
        low: Lower end of the 95 % interval, ``mu - 1.96 se``.
        high: Upper end of the 95 % interval, ``mu + 1.96 se``.
        p: Two-sided permutation p-value of "the row is exchangeable with its batch-mates".
        q: Benjamini-Hochberg q-value of ``p`` over the rows of the query.
        t: Moderated t statistic.
        p_t: Two-sided p-value of ``t``.
        observations: Optimizer steps that contained the row; 0 means never observed, which is not a score of 0.
        mean_loss: Training loss averaged over the row's steps, the free baseline for label errors.
    """

    row: int
    query: str
    mu: float
    se: float
    low: float
    high: float
    p: float
    q: float
    t: float
    p_t: float
    observations: int
    mean_loss: float


@dataclass(frozen=True)
class Cells:
    """A table as text: ``head`` [C], ``body`` [R, C], and the colour of each row's score [R]."""

    head: list[str]
    body: list[list[str]]
    colors: list[str]


class ScoreTable(Sequence[RowScore]):
    """An immutable sequence of :class:`RowScore`, as ``report.top()`` and its like return it.

    Args:
        columns: One array [R] for every field of :class:`RowScore`.
        kinds: Kind of each entry's query [R], which decides how the sign is coloured.
        title: Heading of the rendered table.
        note: Sentence below the rendered table.

    Example:
        >>> from ine_callback.report.example import example_report
        >>> table = example_report().bottom(2, query="val")
        >>> len(table), table[0].mu < table[1].mu < 0, table.rows.dtype
        (2, True, dtype('int64'))
    """

    def __init__(
        self, columns: Mapping[str, NDArray[Any]], kinds: NDArray[np.str_], title: str = "", note: str = ""
    ) -> None:
        self._columns = {name: _frozen(columns[name]) for name in RowScore._fields}
        self._kinds = kinds
        self.title = title
        self.note = note

    def __len__(self) -> int:
        return len(self._kinds)

    @overload
    def __getitem__(self, index: int) -> RowScore: ...
    @overload
    def __getitem__(self, index: slice) -> ScoreTable: ...
    def __getitem__(self, index: int | slice) -> RowScore | ScoreTable:
        if isinstance(index, slice):
            parts = {name: column[index] for name, column in self._columns.items()}
            return ScoreTable(parts, self._kinds[index], self.title, self.note)
        return RowScore(*(column.item(index) for column in self._columns.values()))

    @property
    def rows(self) -> NDArray[np.int64]:
        """Dataset indices [R], in the table's order."""
        return self._columns["row"]

    def to_pandas(self) -> Any:
        """A DataFrame with one column for every field of :class:`RowScore`; needs the extra ``report``."""
        return need("pandas", "ScoreTable.to_pandas").DataFrame(dict(self._columns))

    def cells(self, limit: int = SHOWN, compact: bool = False) -> Cells:
        """The first ``limit`` entries as text; ``compact`` leaves out interval and p for narrow places."""
        part = self[:limit]
        mu_places = decimals(part._columns["mu"])
        one_query = len(set(self._columns["query"].tolist())) <= 1
        makers: dict[str, Callable[[RowScore], str]] = {
            "row": lambda one: str(one.row),
            "query": lambda one: plain(one.query),
            "μ": lambda one: signed(one.mu, mu_places),
            "± se": lambda one: number(one.se, mu_places),
            "95 % interval": lambda one: _interval(one, mu_places),
            "p": lambda one: probability(one.p),
            "q": lambda one: probability(one.q),
            "seen": lambda one: f"{one.observations}×" if one.observations else "never",
            "mean loss": lambda one: number(one.mean_loss),
        }
        left_out = {"95 % interval", "p"} if compact else {"± se"}
        left_out |= {"query"} if one_query else set()
        shown = {name: maker for name, maker in makers.items() if name not in left_out}
        colors = [
            tails(str(kind)).color(mu) if np.isfinite(mu) else ""
            for kind, mu in zip(part._kinds, part._columns["mu"], strict=True)
        ]
        return Cells(list(shown), [[maker(one) for maker in shown.values()] for one in part], colors)

    def _more(self) -> str:
        hidden = len(self) - SHOWN
        more = f"… and {hidden:,} more: to_pandas() holds all" if hidden > 0 else ""
        return " · ".join(part for part in (plain(self.note), more) if part)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        return Group(self.render(), *([Text(self._more(), "dim")] if self._more() else []))

    def render(self, limit: int = SHOWN, compact: bool = False) -> Table:
        """The table for a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        cells = self.cells(limit, compact)
        table = Table(box=box.SIMPLE_HEAD, title=Text(plain(self.title)), title_justify="left", title_style="bold")
        for name in cells.head:
            table.add_column(name, justify="left" if name == "query" else "right", no_wrap=name != "query")
        for texts, color in zip(cells.body, cells.colors, strict=True):
            named = zip(cells.head, texts, strict=True)
            table.add_row(*(Text(text, color if name == "μ" else _dim(text)) for name, text in named))
        return table

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return f"ScoreTable({plain(self.title)!r}, {len(self)} rows)"

    def _repr_html_(self) -> str:
        return f"<div>{self.html()}</div>"

    def html(self, limit: int = SHOWN) -> str:
        """The table as an escaped HTML fragment without style sheet."""
        cells = self.cells(limit)
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in cells.head)
        lines = []
        for texts, color in zip(cells.body, cells.colors, strict=True):
            styles = [f' style="color:{color}"' if name == "μ" and color else "" for name in cells.head]
            lines.append("".join(f"<td{style}>{escape(text)}</td>" for text, style in zip(texts, styles, strict=True)))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        note = f"<p>{escape(self._more())}</p>" if self._more() else ""
        caption = f"<caption>{escape(plain(self.title))}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _dim(text: str) -> str:
    return "dim" if text == MISSING else ""


def _interval(one: RowScore, places: int) -> str:
    if not (np.isfinite(one.low) and np.isfinite(one.high)):
        return MISSING
    return f"{signed(one.low, places)} … {signed(one.high, places)}"


def _frozen(column: NDArray[Any]) -> NDArray[Any]:
    view = np.asarray(column).view()
    view.flags.writeable = False
    return view
