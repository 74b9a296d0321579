"""What users hold after a run: scores and their provenance, ready to ask, print, save and plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ine_callback.applications.fairness import NAME as FAIR
from ine_callback.applications.fairness import Subspaces, subspaces_of
from ine_callback.applications.token_mask import TokenMask, token_mask
from ine_callback.errors import InfluenceError
from ine_callback.report import (
    attribution_store,
    compare,
    export,
    html,
    legacy,
    markdown,
    plots,
    store,
    stored_vectors,
    view,
)
from ine_callback.report.attribution_combine import combine_attributions
from ine_callback.report.axes import Plots
from ine_callback.report.combine import combine_runs, combine_scores
from ine_callback.report.compare import Comparison
from ine_callback.report.contents import Contents
from ine_callback.report.effects_view import effects_in
from ine_callback.report.export import Format
from ine_callback.report.files import replace_file, replacing
from ine_callback.report.reading import named
from ine_callback.report.runinfo import RunInfo
from ine_callback.report.samples import Render
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import Attribution, Scores
from ine_callback.utilities.terminal import as_text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from rich.console import Group

    from ine_callback.effects import Effect, Paths
    from ine_callback.effects.reported import Effects


class InfluenceReport(Contents, legacy.FormerNames):
    """Scores of every row on every query, with tests and provenance.

    Sign, everywhere: ``mu > 0`` means that training on the row lowers the query (helpful). Rows that were never
    observed have no score: they are listed in :attr:`unseen` and never appear with a score of 0.

    Wherever a method takes ``query``, its default is the report's first query.

    Args:
        scores: What a method's ``finish()`` returned.
        run: Provenance.
        attributions: Scores by methods that ran on the trained model; of several stages of training in their order.
        store: What later queries are asked of, where the run kept it.

    Raises:
        ValueError: If scores have wrong shapes, or two attributions one method and one stage.

    Example:
        >>> from ine_callback.report import example_report
        >>> report = example_report()
        >>> report
        InfluenceReport(60 rows, queries: 'self', 'val', 'val margin'; 1 row never observed)
        >>> report.top(2, query="val").rows
        array([5, 2])
        >>> worst = report.bottom(1, query="val margin")[0]
        >>> worst.row, round(worst.mu, 2), worst.q < 0.05, worst.observations
        (3, -0.43, True, 9)
    """

    def __init__(
        self,
        scores: Scores,
        run: RunInfo | None = None,
        attributions: Sequence[Attribution] = (),
        store: StoredVectors | None = None,
    ) -> None:
        super().__init__(scores, run, attributions)
        if store is not None and len(store.seen) != self.rows:
            raise ValueError(f"InfluenceReport: the store has {len(store.seen)} rows, the scores have {self.rows}")
        self.store = store

    def with_attributions(self, *found: Attribution) -> InfluenceReport:
        """The same report with scores by methods that ran later, in place of the present ones by the same methods."""
        methods = {each.method for each in found}
        others = [each for each in self.attributions if each.method not in methods]
        return InfluenceReport(self.scores, self.run, [*others, *found], self.store)

    def token_mask(
        self,
        method: str | None = None,
        query: str | None = None,
        quantile: float = 0.99,
        window: int = 1,
        budget: float = 0.02,
    ) -> TokenMask:
        """Which tokens to suppress: those that raise the query most, see :mod:`ine_callback.applications.token_mask`.

        Args:
            method: One that has scored tokens; by default the last one.
            query: Name of its query, the first by default.
            quantile: Tokens with a score above this quantile are chosen, with their neighbours.
            window: How many neighbours on each side.
            budget: Most chosen tokens, as a share of all tokens.

        Raises:
            InfluenceError: If there are no scores of tokens, or a setting is impossible.
        """
        found = [each for each in self.attributions if each.tokens is not None and method in (None, each.method)]
        if not found:
            who = "no method" if method is None else repr(method)
            raise InfluenceError(f"token_mask: {who} has scored tokens; add TokenInfluence(...) to methods.")
        return token_mask(found[-1], query, quantile, window, budget)

    @classmethod
    def combine(cls, reports: Sequence[InfluenceReport]) -> InfluenceReport:
        """Several runs of the same training set and queries with different seeds, as one report with better scores.

        ``mu`` is the mean over the runs that observed the row; ``se``, ``t`` and ``p_t`` come from the scatter between
        runs (moderated, NaN with a single observing run) and test "the row's score averaged over seeds is 0"; ``p``
        joins the runs' signed permutation p-values (Stouffer), so that runs which disagree in sign cancel. The notes
        tell how many findings repeat. Formulas: ``report/combine.py``; of other methods' scores
        ``report/attribution_combine.py``.

        Args:
            reports: At least two single runs' reports, all with the same rows, and queries of the same names and kinds.

        Raises:
            ValueError: On fewer than two reports, other rows or queries, the same run twice, or a combined report.

        Example:
            >>> from ine_callback.report import example_report
            >>> both = InfluenceReport.combine([example_report(seed=1), example_report(seed=2)])
            >>> both.drop_list().tolist(), both.run.config["seeds"]
            ([3, 17, 29], [1, 2])
            >>> print(both.run.notes[1])
            Query 'self': of 3 rows flagged (q ≤ 0.05) in any run, 3 are flagged in all 2 with the same sign.
        """
        scores = combine_scores([report.scores for report in reports])
        run = combine_runs([report.run for report in reports], [report.scores for report in reports])
        found, notes = combine_attributions([report.attributions for report in reports])
        return cls(scores, replace(run, notes=[*run.notes, *notes]), found)

    # ---- out ----

    def to_pandas(self) -> Any:
        """All rows and queries as a long DataFrame; rows never observed are there, with NaN. Needs extra ``report``.

        A method that ran on the trained model adds a column with its name, and with ``_se`` and ``_q`` appended.

        Example:
            >>> from ine_callback.report import example_report
            >>> list(example_report().to_pandas().columns[:4])
            ['row', 'query', 'mu', 'se']
        """
        return export.to_pandas(self)

    def to_arrow(self) -> pa.Table:
        """The same as an Arrow table: ``null`` where :meth:`to_pandas` has NaN.

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().to_arrow()["mu"].null_count  # one row never observed, three queries
            3
        """
        return export.to_arrow(self)

    def to_polars(self) -> Any:
        """The same as a polars DataFrame; needs the package ``polars``."""
        return export.to_polars(self)

    def to_dataset_column(self, query: str | None = None, name: str = "mu") -> pa.Array:
        """One number of each row [N], aligned to the training set; ``null`` where the row was never observed.

        Hugging Face ``datasets`` take it as it is: ``dataset.add_column("influence", report.to_dataset_column())``.

        Args:
            query: Name of the query.
            name: Which number: a field of :class:`RowScore`, such as ``"mu"``, ``"q"`` or ``"mean_loss"``.

        Example:
            >>> from ine_callback.report import example_report
            >>> column = example_report().to_dataset_column("self", "q")
            >>> len(column), column.null_count, column[3].as_py() < 0.001
            (60, 1, True)
        """
        return export.to_dataset_column(self, query, name)

    def to_markdown(self, queries: Iterable[str] | None = None) -> str:
        """A summary for pull requests: headline, warnings, extreme rows of each query, notes; foreign text escaped.

        Args:
            queries: Names of the queries shown in full; by default the first four. All are in the overview.

        Example:
            >>> from ine_callback.report import example_report
            >>> print(example_report().to_markdown().splitlines()[2])
            **60** rows · **59** observed · **1** never observed · **30** steps · **98.4 %** parameters captured
        """
        return markdown.markdown(self, queries)

    def export(self, path: str | Path, form: Format = "csv", query: str | None = None, q: float | None = None) -> Path:
        r"""Writes one file for other programs; :meth:`save` writes what :meth:`load` reads.

        Args:
            path: File to write.
            form: ``"csv"``, ``"json"`` and ``"parquet"`` hold :meth:`to_pandas`'s lines, ``"markdown"``
                :meth:`to_markdown`; ``"drop-list"`` and ``"keep-list"`` are row ids, as CSV under the head ``row``,
                or as JSON where the path ends in ``.json``.
            query: Name of the query; by default all, of the lists as in :meth:`drop_list`.
            q: False discovery rate of the lists; by default as in :meth:`drop_list`.

        Example:
            >>> from ine_callback.report import example_report
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     example_report().export(f"{folder}/drop.json", "drop-list").read_text()
            '[3, 17, 29]\n'
        """
        return export.export(self, Path(path), form, query, q)

    def compare(self, other: InfluenceReport, q: float = 0.05) -> Comparison:
        """This report beside another of the same training set: which findings repeat, how alike the rankings are.

        Args:
            other: Another run's report, with the same rows and at least one query of the same name and kind.
            q: Rows with a q-value up to this are findings.

        Raises:
            ValueError: On another number of rows, or no common query.

        Example:
            >>> from ine_callback.report import example_report
            >>> found = example_report(seed=1).compare(example_report(seed=2))
            >>> found["self"].repeated, found["self"].jaccard, found["self"].rank_correlation < 0.5
            ((3, 17, 29), 1.0, True)
        """
        return compare.compare(self, other, q)

    def summary(self) -> dict[str, Any]:
        """The headline as plain JSON types, as terminal and HTML show it.

        Example:
            >>> from ine_callback.report import example_report
            >>> summary = example_report().summary()
            >>> summary["rows"], summary["seen"], summary["queries"][0]["suspects"], summary["null_checks_failed"]
            (60, 59, 3, [])
        """
        return view.summary(self)

    def save(self, folder: str | Path) -> Path:
        """Writes ``scores.parquet``, ``null.parquet`` and ``meta.json`` into ``folder``, leaving its other files alone.

        Also ``margins.parquet``, where the run knew the model's predictions. With :attr:`attributions` also
        ``attributions.json`` and ``attributions.parquet``, and where they have such
        parts ``attribution_layers.parquet``, ``attribution_tokens.parquet`` and ``attribution_arrays.parquet``. With a
        :attr:`store` also ``store.npy`` and the files beside it (:mod:`ine_callback.report.stored_vectors`).

        An interrupted save, even one whose process is killed, leaves the former report or this one; never a mixture.
        """
        names = store.FILES + attribution_store.FILES + stored_vectors.FILES + legacy.FILES
        with replacing(Path(folder), names) as aside:
            store.write(self.scores, self.run, aside)
            attribution_store.write(self.attributions, aside)
            if self.store is not None:
                stored_vectors.write(self.store, aside)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> InfluenceReport:
        """Reads what :meth:`save` wrote: data only, nothing is executed.

        Raises:
            ReportError: When the folder holds no readable report; the message says what is wrong.

        Example:
            >>> from ine_callback.report import example_report
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     again = InfluenceReport.load(example_report().save(folder))
            >>> bool((again.top(5, "val").rows == example_report().top(5, "val").rows).all())
            True
        """
        with named(Path(folder)):
            found = attribution_store.load(Path(folder)) + legacy.load(Path(folder))
            return cls(*store.load(Path(folder)), found, stored_vectors.load(Path(folder)))

    def write_html(
        self,
        path: str | Path,
        queries: Iterable[str] | None = None,
        samples: Any = None,
        labels: Any = None,
        render: Render | None = None,
    ) -> Path:
        """Writes one self-contained HTML file that opens without network; needs the extra ``report``.

        The page runs our script and Bokeh's, and nothing from data. Where a row cannot be shown, the page says why.

        Args:
            path: File to write.
            queries: Names of the queries with a tab; by default the first 24. All are in the overview.
            samples: The training set: ``samples[row]`` of at most 360 rows are read and put into the file.
            labels: Class of each row [N], numbers or texts; by default from ``samples``.
            render: Makes a sample an ``Image``, a ``Text`` or ``Values`` (see :func:`~ine_callback.report.rendered`).

        Raises:
            ValueError: If labels are no classes of the rows; KeyError on a query that does not exist.
        """
        return replace_file(Path(path), html.page(self, queries, samples, labels, render).encode())

    @property
    def plot(self) -> Plots:
        """Single plots, on your axes if you pass them: ``report.plot.volcano("val", ax=ax)``."""
        return Plots(self)

    @property
    def subspaces(self) -> Subspaces:
        """What :class:`~ine_callback.FairSubspaces` found: directions, the trade-off path, projections and heads.

        Raises:
            ValueError: If it did not run.
        """
        return subspaces_of(self.attribution(FAIR))

    @property
    def effects(self) -> Effects:
        """Causal effects with each row's influence on them: what ``CausalEffects`` or :meth:`with_effects` put here.

        Raises:
            InfluenceError: If there are none.
        """
        return effects_in(self.attributions)

    def with_effects(self, *found: Effect | Paths, rows: ArrayLike | None = None) -> InfluenceReport:
        """The same report with effects in place of the present ones; they are saved, shown and compared with it.

        Args:
            found: By :func:`~ine_callback.effects.estimate`, and at most one by :func:`~ine_callback.effects.paths`.
            rows: Dataset index of each row of their data; None: all of the report's rows, in their order.

        Raises:
            InfluenceError: If they are not of these rows, or ask one thing twice.
        """
        from ine_callback.effects.reported import attribution

        made = attribution(found, rows)
        if made.rows.max() >= self.rows or (rows is None and len(made.rows) != self.rows):
            raise InfluenceError(
                f"with_effects: the effects are of {len(made.rows):,} rows, and the report has {self.rows:,}; name the "
                "dataset index of each with rows=."
            )
        return self.with_attributions(made)

    def figure(self, query: str | None = None) -> Any:
        """The three plots of a query in one matplotlib ``Figure``; needs the extra ``report``."""
        return plots.figure(self, query)

    def __rich__(self) -> Group:
        return view.terminal(self)

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return view.one_line(self)

    def _repr_html_(self) -> str:
        return html.notebook(self)


def save_with_page(report: InfluenceReport, folder: Path, samples: Any = None) -> None:
    """Saves the report and, where the extra ``report`` is installed, its page."""
    report.save(folder)
    if find_spec("jinja2") and find_spec("bokeh"):
        report.write_html(folder / "report.html", samples=samples)
