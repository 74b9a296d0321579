"""What methods hand to the report: one number per row and query, with its tests. No torch.

:class:`Scores` is what a method that accumulates over training steps computes, :class:`Attribution` what one that runs
on a trained model returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

QueryKind = Literal["loss", "margin", "self", "custom"]
Stage = int | Literal["end"]  # finished epochs, or the end of training
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class QueryInfo:
    """A query's name and the question that its column answers.

    Attributes:
        name: Unique name, the report's column.
        kind: ``"loss"`` and ``"custom"`` are losses, ``"margin"`` a negated margin, ``"self"`` the row's own loss.
        question: One sentence a newcomer understands, shown in every report.
    """

    name: str
    kind: QueryKind
    question: str


@dataclass(frozen=True)
class Scores:
    """Scores of all rows on all queries; a positive ``mu`` means that training on the row lowers the query (helpful).

    Every ``[N, Q]`` array is NaN where the row was never observed.

    Attributes:
        queries: The Q queries, in column order.
        mu: Gaussian influence [N, Q], in standard deviations of training randomness.
        se: Standard error of ``mu`` over training runs [N, Q], from the contrasts between a layer's units; with fixed
            initial weights from the row's own visits (of a combined report: from its scores between the runs).
        p: Two-sided permutation p-value [N, Q] of "the row is exchangeable with its batch-mates".
        q: Benjamini-Hochberg q-value [N, Q] of ``p`` over the rows of a query.
        t: Moderated t statistic [N, Q] (NaN with fewer than two observations).
        p_t: Two-sided p-value of ``t`` [N, Q].
        null_sd: Standard deviation of the row's ``mu`` under the null [N, Q].
        observations: Number of optimizer steps that contained the row [N].
        mean_loss: The row's training loss averaged over its visits [N] (all NaN where the loss could not be read).
        null_mu: Draws of a row's ``mu / null_sd`` under the permutation null [Q, M], for plots.
        null_ks_p: Kolmogorov-Smirnov p-value [Q] of the uniformity of a held-out null draw's p-values.
    """

    queries: tuple[QueryInfo, ...]
    mu: Floats
    se: Floats
    p: Floats
    q: Floats
    t: Floats
    p_t: Floats
    null_sd: Floats
    observations: NDArray[np.int64]
    mean_loss: Floats
    null_mu: Floats
    null_ks_p: Floats

    def first(self, rows: int) -> Scores:
        """The scores of rows 0 to ``rows - 1``."""
        arrays = (f.name for f in fields(self) if f.name not in ("queries", "null_mu", "null_ks_p"))
        return replace(self, **{name: getattr(self, name)[:rows] for name in arrays})


@dataclass(frozen=True)
class Check:
    """One check of a method's result.

    Attributes:
        name: What was checked.
        value: What was found (NaN: could not be told).
        limit: What it may be, as text.
        passed: Whether it is.
        remedy: Which knob to turn if not.
    """

    name: str
    value: float
    limit: str
    passed: bool
    remedy: str


@dataclass(frozen=True)
class LayerScores:
    """Scores of each layer's parameters alone; where a score is a sum over layers, they add up to it.

    Attributes:
        names: The L layers.
        scores: [R, L, Q].
    """

    names: tuple[str, ...]
    scores: Floats


@dataclass(frozen=True)
class TokenScores:
    """Scores of the terms of each row's loss, such as a sequence's tokens; a row's terms add up to its score.

    Rows may have different numbers of terms: those of row k are ``offsets[k]`` to ``offsets[k + 1]``.

    Attributes:
        offsets: [R + 1], the first one 0 and the last one T.
        scores: [T, Q].
        se: Standard error of ``scores`` [T, Q], where it is known.
        q: Benjamini-Hochberg q-value [T, Q] of "the score is 0" over all terms of a query, where it is known.

    Example:
        >>> tokens = TokenScores(np.array([0, 2, 5]), np.arange(5.0)[:, None])
        >>> tokens.of(1)[:, 0]
        array([2., 3., 4.])
    """

    offsets: NDArray[np.int64]
    scores: Floats
    se: Floats | None = None
    q: Floats | None = None

    def of(self, position: int) -> Floats:
        """Scores [t, Q] of the terms of the row at this position of :attr:`Attribution.rows`."""
        return self.scores[self.offsets[position] : self.offsets[position + 1]]


@dataclass(frozen=True)
class Attribution:
    """Scores of R rows on Q queries by one method; a positive score means that training on the row lowers the query.

    The one form in which every method that runs on a trained model reports. It is stored, shown, exported, compared and
    combined by these fields alone. A further column or array can be read like an attribute: ``found.laplace``.

    Attributes:
        method: The method's name, such as ``"BIF"``.
        rows: Dataset index of each row [R].
        queries: The Q queries, in column order.
        scores: [R, Q].
        se: Standard error of ``scores`` [R, Q], where it is known.
        p: Two-sided p-value [R, Q] of "the score is 0", where it is known.
        q: Benjamini-Hochberg q-value [R, Q] of ``p`` over the rows of a query, where it is known.
        columns: Further numbers of each row and query, by name [R, Q].
        ranked_by: The column by which rows are ranked and which is shown; empty: ``scores``. Its standard error is
            the column of the same name with ``_se``.
        doubtful: Pairs [R, Q] whose score says little, where the method can tell.
        layers: Scores by layer, where asked for.
        tokens: Scores by the terms of the rows' losses, where asked for.
        checks: The method's checks of itself, failed ones included.
        settings: Settings as used.
        arrays: Further arrays of any shape, such as a trace.
        notes: Sentences for the reader.
        title: The method's name in full, for headings.
        headline: The run of the method in one line.
        legend: How its numbers are read.
        at: Finished epochs when the method ran, or ``"end"``.

    Example:
        >>> found = example_attribution()
        >>> found.top(2, "val"), found.reliable
        (array([4, 1]), True)
    """

    method: str
    rows: NDArray[np.int64]
    queries: tuple[QueryInfo, ...]
    scores: Floats
    se: Floats | None = None
    p: Floats | None = None
    q: Floats | None = None
    columns: Mapping[str, Floats] = field(default_factory=dict)
    ranked_by: str = ""
    doubtful: NDArray[np.bool_] | None = None
    layers: LayerScores | None = None
    tokens: TokenScores | None = None
    checks: tuple[Check, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Floats] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    title: str = ""
    headline: str = ""
    legend: str = ""
    at: Stage = "end"

    def __getattr__(self, name: str) -> Floats:
        # only called for what is no field; while being unpickled an instance has no fields yet
        extra: dict[str, Floats] = {**vars(self).get("columns", {}), **vars(self).get("arrays", {})}
        if name in extra:
            return extra[name]
        raise AttributeError(f"Attribution by {vars(self).get('method')!r}: no field, column or array {name!r}")

    @property
    def reliable(self) -> bool:
        """Whether every check was passed."""
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """What failed, and which knob to turn."""
        return [f"{c.name} is {c.value:.3g} (should be {c.limit}): {c.remedy}" for c in self.checks if not c.passed]

    @property
    def ranking(self) -> Floats:
        """What rows are ranked by and shown [R, Q]."""
        return self.columns[self.ranked_by] if self.ranked_by else self.scores

    @property
    def ranking_se(self) -> Floats | None:
        """Standard error of :attr:`ranking` [R, Q], where it is known."""
        return self.columns.get(f"{self.ranked_by}_se") if self.ranked_by else self.se

    def column(self, query: str | None = None) -> int:
        """Column of a query, the first by default.

        Raises:
            KeyError: When there is no such query.
        """
        names = [info.name for info in self.queries]
        if query is None:
            return 0
        if query not in names:
            choices = ", ".join(map(repr, names))
            raise KeyError(f"Attribution by {self.method!r}: no query {query!r}; choose one of {choices}")
        return names.index(query)

    def top(self, k: int = 10, query: str | None = None) -> NDArray[np.int64]:
        """Dataset indices of the ``k`` most helpful rows, best first."""
        return self.rows[np.argsort(-self.ranking[:, self.column(query)], kind="stable")][:k]

    def bottom(self, k: int = 10, query: str | None = None) -> NDArray[np.int64]:
        """Dataset indices of the ``k`` most harmful rows, worst first."""
        return self.rows[np.argsort(self.ranking[:, self.column(query)], kind="stable")][:k]


def example_attribution() -> Attribution:
    """Five rows on one query, for examples."""
    scores = np.array([[0.1], [0.5], [-0.3], [0.0], [0.9]])
    error = np.full((5, 1), 0.1)
    info = QueryInfo("val", "loss", "Does training on this row lower the mean loss on the validation set?")
    check = Check("residual", 1e-6, "below 0.01", True, "raise iterations")
    return Attribution("example", np.arange(5), (info,), scores, error, error, error, checks=(check,))
