"""Which labels are wrong, with a stated false-discovery rate; and the rows by suspicion, with no test.

A row's margin ``m = log p(label) - log p(likeliest other class)`` is recorded at every visit, before the step, and
averaged over windows of visits (1, 2, 3-4, 5-8, ...). In one window a row *disagrees* where m < 0, and ``|m|`` is how
sure the model is. Where it is sure and right, a right label agrees; a wrong one disagrees, however sure the model is.
So the fraction of disagreeing rows falls as ``|m|`` rises, and what is left among the surest rows is the fraction e of
wrong labels: near 0 on clean data. The estimated probability that a disagreeing row's label is wrong is

    P(wrong) = min(1, e / d(|m|)) / (1 + exp(m))

with d the fraction of disagreeing rows at that sureness (a decreasing step function, fitted by isotonic regression).
The second factor is the model's own: what it gives the other class, of the two. The list takes rows from the most
probable on, while the mean of ``1 - P(wrong)`` over it, the estimated false-discovery rate, is at most q.

The first visit comes before the network knows anything, and is left out. Late in training a network may have learnt
wrong labels by heart, and then its surest rows agree. So the window is the latest one that finds at least half of what
the best one finds. Windows in which the rows that disagree beyond e, the network's own errors, are more than e and more
than 5 % are left out: there hard rows cannot be told from wrong labels. How often the stated rate holds:
docs/methods/label-errors.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ine_callback.scores import Floats, Scores
from ine_callback.utilities.validate import threshold
from ine_callback.utilities.words import NO_QUERY, tails

Rows = NDArray[np.int64]
RATE = 0.1  # default false-discovery rate of label errors
TESTED_RATE = 0.05  # default of the test "exchangeable with its batch-mates"
BINS, ROWS_A_BIN = 100, 15
ENOUGH = 10  # disagreeing rows from which e is read
CHANCE = 2.0  # standard errors within which steps are level
LATE = 0.5
DOUBT = 0.3  # noise beyond which the labels, or the network, may be to blame
OWN_ERRORS = 0.05  # fraction of the rows that the network may get wrong itself
RANDOM = 0.6  # a window in which more rows disagree says nothing


@dataclass(frozen=True)
class LabelErrors:
    """Rows whose label is probably wrong, the most probable first.

    Attributes:
        rows: Dataset indices [R].
        probability: Estimated probability that the row's label is wrong [R].
        rate: Estimated false-discovery rate of the list; NaN where it is empty.
        q: What was asked for.
        noise: Estimated fraction of wrong labels in the training set; NaN where nothing could be told.
        visits: First and last visit of the window that was used; (0, 0) where there was none.
        note: What the reader must know, in a sentence or two; may be empty.
    """

    rows: Rows
    probability: Floats
    rate: float
    q: float
    noise: float
    visits: tuple[int, int]
    note: str

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not len(self):
            return f"No label is listed at a false-discovery rate of {self.q:g}. {self.note}".rstrip()
        rows = f"{len(self):,} label{' is' if len(self) == 1 else 's are'}"
        return f"{rows} probably wrong; an estimated {self.rate:.1%} of the list is right. {self.note}".rstrip()


@dataclass(frozen=True)
class _Window:
    """One window of visits: probabilities [N] that labels are wrong, and what they came from.

    Attributes:
        probability: [N], 0 for rows that agree.
        noise: Estimated fraction of wrong labels.
        lowest: The same, as low as it may be.
        disagreeing: Fraction of the rows that disagree.
        listed: The list.
    """

    probability: Floats
    noise: float
    lowest: float
    disagreeing: float
    listed: Rows

    @property
    def tells(self) -> bool:
        """Whether the network's own errors are few, or at least fewer than the wrong labels."""
        return self.disagreeing - self.lowest <= max(self.lowest, OWN_ERRORS)

    @property
    def found(self) -> float:
        """Wrong labels expected in the list."""
        return float(self.probability[self.listed].sum())


def knows_labels(scores: Scores) -> bool:
    """Whether the run knew what the model said against each row's label."""
    return scores.margins is not None and bool(np.isfinite(scores.margins).any())


def label_errors(scores: Scores, q: float, who: str) -> LabelErrors:
    """See :meth:`InfluenceReport.label_errors`."""
    q = threshold(q, who)
    if scores.margins is None or not knows_labels(scores):
        return _nothing(
            q,
            "The run's loss has no one label a row, so nothing is known of what the model said against it; "
            "report.unlike_batch_mates() lists rows that stand out, report.suspect_labels() ranks them.",
        )
    later = scores.margins[:, 1:]
    usable = [k for k in range(later.shape[1]) if np.isfinite(later[:, k]).sum() * 2 > _visited(scores)]
    if not usable:
        return _nothing(
            q,
            "Most rows were visited once: the model's first predictions are no evidence against a label. "
            "Train for at least two epochs; report.suspect_labels() ranks rows.",
        )
    told = [k for k in usable if _disagreeing(later[:, k]) <= RANDOM]
    if not told:
        return _nothing(
            q,
            "The model disagreed with most labels throughout: it has learnt too little, or the labels have little "
            "to do with the data. Nothing is listed.",
        )
    windows = {k: _window(later[:, k], q) for k in told}
    windows = {k: window for k, window in windows.items() if window.tells}
    if not windows:
        return _nothing(
            q,
            "The model's own errors outnumber the wrong labels that may be there, which cannot be told from hard rows: "
            "train longer, or read report.suspect_labels() from the top.",
        )
    most = max(window.found for window in windows.values())
    chosen = max(k for k, window in windows.items() if window.found >= LATE * most)
    note = _doubt(windows[chosen]) or ("" if most else _learnt(later, usable))
    return _list(windows[chosen], chosen, q, note)


def suspicion(scores: Scores) -> Floats:
    """How suspicious each row's label is [N], in no unit: the mean over windows of ``-tanh(margin / 2)``.

    Without margins the mean loss. NaN for rows of which nothing is known.
    """
    if scores.margins is None or not knows_labels(scores):
        return scores.mean_loss
    against = -np.tanh(scores.margins / 2)
    known = np.isfinite(against[:, 1:])
    mean = np.where(known, against[:, 1:], 0.0).sum(1) / np.maximum(known.sum(1), 1)
    out: Floats = np.where(known.any(1), mean, against[:, 0])  # a row that was visited once has its first visit alone
    return out


def _visited(scores: Scores) -> int:
    return int((scores.observations > 0).sum())


def _disagreeing(margins: Floats) -> float:
    """Fraction of the rows with a margin that disagree."""
    return float((margins[np.isfinite(margins)] < 0).mean())


def _window(margins: Floats, q: float) -> _Window:
    """Probabilities from the margins [N] of one window; formulas above."""
    known = np.flatnonzero(np.isfinite(margins))
    m = margins[known]
    order = np.argsort(-np.abs(m), kind="stable")
    bins = np.array_split(order, max(1, min(BINS, len(m) // ROWS_A_BIN)))
    sizes = np.array([len(each) for each in bins], dtype=np.float64)
    counts = np.array([(m[each] < 0).sum() for each in bins], dtype=np.float64)
    fraction = increasing(counts / sizes, sizes)
    lowest, noise = _floor(fraction, counts, sizes)
    at = np.empty(len(m))
    at[order] = np.repeat(fraction, sizes.astype(np.int64))
    wrong = np.minimum(noise / np.maximum(at, 1e-12), 1.0) / (1.0 + np.exp(np.clip(m, -50.0, 50.0)))
    probability = np.zeros(len(margins))
    probability[known] = np.where(m < 0, wrong, 0.0)
    return _Window(probability, noise, lowest, _disagreeing(margins), _first(probability, q))


def _floor(fraction: Floats, counts: Floats, sizes: Floats) -> tuple[float, float]:
    """Fraction of disagreeing rows among the surest, less one row: of the first steps, and of all level with them.

    Args:
        fraction: Fraction of disagreeing rows of each bin, increasing [B].
        counts: Disagreeing rows of each bin [B].
        sizes: Rows of each bin [B].
    """
    ends = np.flatnonzero(np.append(np.diff(fraction) > 1e-12, True))
    found, rows = counts.cumsum(), sizes.cumsum()
    enough = ends[found[ends] >= ENOUGH]
    end = int(enough[0]) if len(enough) else len(counts) - 1  # the fewest steps that hold enough rows
    level = (found[end] + CHANCE * np.sqrt(found[end])) / rows[end]
    last = max(end, int((fraction <= level).sum()) - 1)  # with those no higher within chance: the lowest is too low
    lowest, noise = (max(0.0, float(found[k]) - 1.0) / float(rows[k]) for k in (end, last))
    return lowest, noise


def increasing(values: Floats, weights: Floats) -> Floats:
    """The nearest increasing step function to values [n], by weighted least squares (pool adjacent violators).

    Example:
        >>> increasing(np.array([0.0, 3.0, 1.0, 4.0]), np.ones(4))
        array([0., 2., 2., 4.])
    """
    steps: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        step = (value, weight, 1)
        while steps and steps[-1][0] >= step[0]:
            mean, mass, length = steps.pop()
            total = mass + step[1]
            step = ((mean * mass + step[0] * step[1]) / total, total, length + step[2])
        steps.append(step)
    return np.repeat([mean for mean, _, _ in steps], [length for _, _, length in steps])


def _first(probability: Floats, q: float) -> Rows:
    """The longest list, from the most probable row on, whose mean probability of a right label is at most q."""
    order = np.argsort(-probability, kind="stable")[: int((probability > 0).sum())]
    rates = np.cumsum(1.0 - probability[order]) / np.arange(1, len(order) + 1)
    within = np.flatnonzero(rates <= q)
    return order[: within[-1] + 1 if len(within) else 0].astype(np.int64)


def _list(window: _Window, k: int, q: float, note: str) -> LabelErrors:
    rows = window.listed
    probability = window.probability[rows]
    rate = float((1.0 - probability).mean()) if len(rows) else float("nan")
    return LabelErrors(rows, probability, rate, q, window.noise, (2**k + 1, 2 ** (k + 1)), note)


def _doubt(window: _Window) -> str:
    """Says where as many disagreements may be the network's errors: then its surest rows tell nothing."""
    if window.noise <= DOUBT:
        return ""
    return (
        f"The model disagrees with {window.noise:.0%} of the labels even where it is surest. Either so many are wrong, "
        "or it is often sure and wrong itself; then far more of the list is right than estimated. Its error on clean "
        "validation data tells which."
    )


def _learnt(later: Floats, usable: list[int]) -> str:
    """Says where a network agrees with nearly every label in the end: wrong ones may be among them."""
    first, last = _disagreeing(later[:, usable[0]]), _disagreeing(later[:, usable[-1]])
    if last < 0.01 and first > 0.1:
        return (
            "In the end the model agrees with nearly every label, after many disagreements: it may have learnt wrong "
            "labels by heart before they could be told from hard rows."
        )
    return ""


def _nothing(q: float, note: str) -> LabelErrors:
    empty = np.empty(0, dtype=np.int64)
    return LabelErrors(empty, np.empty(0), float("nan"), q, float("nan"), (0, 0), note)


def recommended(scores: Scores) -> str:
    """See :attr:`InfluenceReport.recommended_query`.

    Raises:
        KeyError: Where f-INE scored no query.
    """
    if not scores.queries:
        raise KeyError(f"InfluenceReport: {NO_QUERY}")
    for kind in ("self", "margin"):
        for query in scores.queries:
            if query.kind == kind:
                return query.name
    return scores.queries[0].name


def suspects(scores: Scores, q: float, column: int, who: str) -> Rows:
    """See :meth:`InfluenceReport.unlike_batch_mates`."""
    mu = scores.mu[:, column] * tails(scores.queries[column].kind).suspect
    rows = np.flatnonzero((scores.q[:, column] <= threshold(q, who)) & (mu > 0))
    return rows[np.argsort(-mu[rows], kind="stable")]


def by_suspicion(scores: Scores, k: int | None) -> Rows:
    """See :meth:`InfluenceReport.suspect_labels`."""
    found = suspicion(scores)
    rows = np.flatnonzero(np.isfinite(found))
    if not len(rows):
        raise ValueError(
            "InfluenceReport.suspect_labels: the run knew no losses of single rows; use drop_list() of a 'self' or "
            "margin query, or train with a standard torch loss"
        )
    return rows[np.argsort(-found[rows], kind="stable")][:k]
