"""What methods hand to the report: one number per row and query, with its tests. No torch.

:class:`Scores` is what a method that accumulates over training steps computes, :class:`Attribution` what one that runs
on a trained model returns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ine_callback.utilities.jsonable import jsonable, unicode

QueryKind = Literal["loss", "margin", "self", "custom", "estimand"]
Stage = int | Literal["end"]  # finished epochs, or the end of training
Floats = NDArray[np.float64]
OF_QUERIES = ("queries", "null_mu", "null_ks_p", "unit", "query_loss")  # fields that are no arrays over rows
WINDOWS = 8  # of a row's visits: 1, 2, 3-4, 5-8, ..., 65 and later


@dataclass(frozen=True)
class QueryInfo:
    """A query's name and the question that its column answers.

    Attributes:
        name: Unique name, the report's column.
        kind: ``"loss"`` and ``"custom"`` are losses, ``"margin"`` a negated margin, ``"self"`` the row's own loss;
            ``"estimand"`` is no loss: a score above 0 raises an estimate, and neither helps nor harms.
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
        margins: The row's mean margin in windows of its visits [N, 8] (visit 1, 2, 3-4, 5-8, ...), NaN where there was
            none; None where the loss has no one label a row. Below 0 the model preferred another class.
        unit: What ``mu`` was divided by [Q], in the query's own unit: its standard deviation over trainings, as one run
            predicts it, or as several measured it. NaN where unknown, such as for self-influence and from fixed initial
            weights; None where no query's is, as in reports of 0.1.
        query_loss: The queries' values [Q] when training ended; likewise NaN or None where unknown.
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
    margins: Floats | None = None
    unit: Floats | None = None
    query_loss: Floats | None = None

    def first(self, rows: int) -> Scores:
        """The scores of rows 0 to ``rows - 1``."""
        arrays = (f.name for f in fields(self) if f.name not in OF_QUERIES)
        return replace(self, **{k: v[:rows] for k in arrays if (v := getattr(self, k)) is not None})


@dataclass(frozen=True)
class Check:
    """One check of a method's result.

    Attributes:
        name: What was checked.
        value: What was found (NaN: could not be told).
        limit: What it may be, as text.
        passed: Whether it is.
        remedy: Which setting to change if not.
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

    (Of a query of kind ``"estimand"``: that the row raises the estimate.)

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

    Raises:
        ValueError: If shapes or names do not belong together. Arrays, lists and tensors on the host are copied, as
            read-only float64.

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

    def __post_init__(self) -> None:
        for name, value in _checked(self).items():
            object.__setattr__(self, name, value)

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
        """What failed, and which setting to change."""
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
        """Dataset indices of the ``k`` most helpful rows, best first; rows without a score are left out."""
        return self._first(-self.ranking[:, self.column(query)], k)

    def bottom(self, k: int = 10, query: str | None = None) -> NDArray[np.int64]:
        """Dataset indices of the ``k`` most harmful rows, worst first; rows without a score are left out."""
        return self._first(self.ranking[:, self.column(query)], k)

    def _first(self, values: Floats, k: int) -> NDArray[np.int64]:
        order = np.argsort(values, kind="stable")
        return self.rows[order[~np.isnan(values[order])]][:k]


def attribute_name(method: str) -> str:
    """What a method's attribution is called as an attribute of a report, and as a column of its tables.

    Example:
        >>> attribute_name("BIF"), attribute_name("gradient norm"), attribute_name("?")
        ('bif', 'gradient_norm', 'method')
    """
    return re.sub(r"\W+", "_", method.lower()).strip("_") or "method"


_TEXTS = ("method", "ranked_by", "title", "headline", "legend")


def _checked(found: Attribution) -> dict[str, Any]:
    """The fields of an attribution as what they are declared to be."""
    who = f"Attribution by {found.method!r}"
    names = [query.name for query in found.queries]
    if not isinstance(found.method, str) or not found.method.strip():
        raise ValueError(f"Attribution: method={found.method!r} is no name; give the method one, such as 'my method'")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{who}: queries are {names}; give at least one query, each with a name of its own")
    if unknown := [query.kind for query in found.queries if query.kind not in get_args(QueryKind)]:
        raise ValueError(f"{who}: query kind {unknown[0]!r} is none of {get_args(QueryKind)}")
    rows = _owned(found.rows, None, f"{who}: rows", np.int64)
    if rows.ndim != 1 or not rows.size or len(np.unique(rows)) < len(rows) or rows.min() < 0:
        raise ValueError(f"{who}: rows must list dataset indices, at least one and each once")
    shape = (len(rows), len(names))
    fields: dict[str, Any] = {"rows": rows, "queries": tuple(found.queries), "at": _stage(found.at, who)}
    for name in ("scores", "se", "p", "q"):
        value = getattr(found, name)
        fields[name] = None if value is None and name != "scores" else _owned(value, shape, f"{who}: {name}")
    if found.doubtful is not None:
        fields["doubtful"] = _owned(found.doubtful, shape, f"{who}: doubtful", np.bool_)
    fields["columns"] = {
        unicode(str(name)): _owned(value, shape, f"{who}: columns[{name!r}]") for name, value in found.columns.items()
    }
    fields["arrays"] = {
        unicode(str(name)): _owned(value, None, f"{who}: arrays[{name!r}]") for name, value in found.arrays.items()
    }
    fields |= {name: _text(getattr(found, name), f"{who}: {name}") for name in _TEXTS}
    fields["notes"] = tuple(_text(note, f"{who}: a note") for note in found.notes)
    if fields["ranked_by"] and fields["ranked_by"] not in fields["columns"]:
        raise ValueError(f"{who}: ranked_by={found.ranked_by!r} is none of its columns {list(found.columns)}")
    fields["layers"] = None if found.layers is None else _checked_layers(found.layers, shape, who)
    fields["tokens"] = None if found.tokens is None else _checked_tokens(found.tokens, shape, who)
    fields["checks"] = tuple(_checked_check(check, f"{who}: a check") for check in found.checks)
    fields["settings"] = {unicode(str(name)): _setting(value) for name, value in found.settings.items()}
    return fields


def _checked_layers(layers: LayerScores, shape: tuple[int, int], who: str) -> LayerScores:
    names = tuple(unicode(str(name)) for name in layers.names)
    if not names:
        raise ValueError(f"{who}: layers names no layer; leave layers out")
    scores = _owned(layers.scores, (shape[0], len(names), shape[1]), f"{who}: layers.scores")
    return LayerScores(names, scores)


def _checked_tokens(tokens: TokenScores, shape: tuple[int, int], who: str) -> TokenScores:
    offsets = _owned(tokens.offsets, (shape[0] + 1,), f"{who}: tokens.offsets", np.int64)
    terms = int(offsets[-1])
    if offsets[0] or (np.diff(offsets) < 0).any() or not terms:
        raise ValueError(f"{who}: tokens.offsets must rise from 0 to the number of all rows' terms")
    known = {name: getattr(tokens, name) for name in ("se", "q")}
    owned = {
        name: None if value is None else _owned(value, (terms, shape[1]), f"{who}: tokens.{name}")
        for name, value in known.items()
    }
    return TokenScores(offsets, _owned(tokens.scores, (terms, shape[1]), f"{who}: tokens.scores"), **owned)


def _owned(value: Any, shape: tuple[int, ...] | None, what: str, kind: Any = np.float64) -> NDArray[Any]:
    """A read-only array that nobody else holds: a method may use its own again at the next stage."""
    array = np.asarray(value)
    if not np.can_cast(array.dtype, kind, "same_kind"):
        raise ValueError(f"{what} has type {array.dtype}, expected {np.dtype(kind)}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}, expected {shape}")
    if array.dtype != kind or array.flags.writeable or not array.flags.owndata:
        array = np.array(array, dtype=kind)
        array.flags.writeable = False
    return array


def _checked_check(check: Check, what: str) -> Check:
    texts = {name: _text(getattr(check, name), f"{what}'s {name}") for name in ("name", "limit", "remedy")}
    return replace(check, value=float(check.value), passed=bool(check.passed), **texts)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r}, expected text")
    return unicode(value)


def _stage(at: Any, who: str) -> Stage:
    if at != "end" and (isinstance(at, bool) or not isinstance(at, int | np.integer) or at < 0):
        raise ValueError(f"{who}: at={at!r} is neither a number of epochs nor 'end'")
    return at if at == "end" else int(at)


def _setting(value: Any) -> Any:
    try:
        return jsonable(value, "")
    except ValueError:
        return unicode(repr(value))


def example_attribution() -> Attribution:
    """Five rows on one query, for examples."""
    scores = np.array([[0.1], [0.5], [-0.3], [0.0], [0.9]])
    error = np.full((5, 1), 0.1)
    info = QueryInfo("val", "loss", "Does training on this row lower the mean loss on the validation set?")
    check = Check("residual", 1e-6, "below 0.01", True, "raise iterations")
    return Attribution("example", np.arange(5), (info,), scores, error, error, error, checks=(check,))
