"""What the chains hand to users and reports: covariances of row losses with queries, their errors, and screens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ine_callback.scores import Floats, QueryInfo

Stage = int | Literal["end"]  # finished epochs, or the end of training
SIZE, SURVIVES = 50.0, 0.7  # effective draws, and share of a covariance that is no trend, at least


@dataclass(frozen=True)
class Screen:
    """One check of the chains.

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
class TermScores:
    """Scores of the terms of each row's loss, such as the tokens of a sequence; a row's terms add up to its score.

    Attributes:
        scores: Covariance of what the term adds to the row's loss with the query [R, T, Q].
        se: Its Monte-Carlo standard error [R, T, Q].
        q: Benjamini-Hochberg q-value [R, T, Q] of "the score is 0" over all terms of a query.
    """

    scores: Floats
    se: Floats
    q: Floats


@dataclass(frozen=True)
class BIFScores:
    """Bayesian influence of R rows on Q queries; a positive score means that training on the row lowers the query.

    A score is the covariance of the row's loss and the query over the local posterior, in squared units of the loss.
    Scores of rows add up to the score of their group.

    Attributes:
        rows: Dataset index of each row [R].
        queries: The Q queries, in column order.
        scores: Covariance [R, Q], by the best unbiased estimator there was.
        se: Monte-Carlo standard error of ``scores`` [R, Q].
        p: Two-sided p-value [R, Q] of "the score is 0" given the posterior (not over trainings).
        q: Benjamini-Hochberg q-value [R, Q] of ``p`` over the rows of a query.
        plain: The chains' own covariance [R, Q], the published estimator.
        plain_se: Its standard error [R, Q].
        laplace: Covariance under the quadratic posterior, gᵢᵀ V v [R, Q]: no noise, but only to first order (NaN
            without a twin).
        trend: Part of ``plain`` that is there because loss and query both drift with the draw index [R, Q].
        size: Effective number of draws behind ``plain`` [R, Q].
        row_sd: Standard deviation of each row's loss over the draws [R].
        query_sd: Standard deviation of each query over the draws [Q].
        loss: Mean loss of the rows at every draw [C, T], the chains' trace.
        screens: The checks, failed ones included.
        settings: Settings as used, calibrated ones filled in.
        notes: Sentences for the reader.
        at: Finished epochs when the chains ran, or ``"end"``.
        terms: Scores of the rows' terms, with ``per_token``.
        interrupted: Whether Ctrl-C ended the chains early.

    Example:
        >>> scores = example_bif_scores()
        >>> scores.top(2, "val"), scores.reliable
        (array([4, 1]), True)
    """

    rows: NDArray[np.int64]
    queries: tuple[QueryInfo, ...]
    scores: Floats
    se: Floats
    p: Floats
    q: Floats
    plain: Floats
    plain_se: Floats
    laplace: Floats
    trend: Floats
    size: Floats
    row_sd: Floats
    query_sd: Floats
    loss: Floats
    screens: tuple[Screen, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    at: Stage = "end"
    terms: TermScores | None = None
    interrupted: bool = False

    @property
    def reliable(self) -> bool:
        """Whether every screen was passed."""
        return all(screen.passed for screen in self.screens)

    @property
    def reasons(self) -> list[str]:
        """What failed, and which knob to turn."""
        return [f"{s.name} is {s.value:.3g} (should be {s.limit}): {s.remedy}" for s in self.screens if not s.passed]

    @property
    def doubtful(self) -> NDArray[np.bool_]:
        """Pairs [R, Q] whose chains say little, whatever the screens of the whole run say.

        Either more than 30 % of the pair's covariance is common drift, beyond two standard errors, or fewer than 50
        effective draws are behind it.
        """
        drifting = np.abs(self.trend) > np.fmax((1 - SURVIVES) * np.abs(self.plain), 2 * self.plain_se)
        return np.asarray(drifting | (self.size < SIZE))

    @property
    def ranking(self) -> Floats:
        """What rows are ranked by [R, Q]: the scores, or with ``BIF(normalized=True)`` the correlations."""
        return self.correlation if self.settings.get("normalized") else self.scores

    @property
    def correlation(self) -> Floats:
        """Scores divided by both standard deviations [R, Q]: comparable between rows and queries, not additive."""
        scale = self.row_sd[:, None] * self.query_sd
        return np.divide(self.scores, scale, out=np.full_like(self.scores, np.nan), where=scale > 0)

    @property
    def shrunk(self) -> Floats:
        """Scores drawn towards the Laplace term by as much as their noise asks for [R, Q]: biased, less error.

        laplace + k (scores − laplace), k = 1 − mean(se²) / mean((scores − laplace)²) per query, at least 0 (James and
        Stein 1961). Without a twin there is no Laplace term, and nothing is shrunk.
        """
        apart = self.scores - self.laplace
        if np.isnan(apart).all():
            return self.scores
        keep = np.clip(1 - (self.se**2).mean(0) / np.maximum((apart**2).mean(0), np.finfo(np.float64).tiny), 0, 1)
        return np.asarray(self.laplace + keep * apart, dtype=np.float64)

    def column(self, query: str | None = None) -> int:
        """Column of a query, the first by default.

        Raises:
            KeyError: When there is no such query.
        """
        names = [info.name for info in self.queries]
        if query is None:
            return 0
        if query not in names:
            raise KeyError(f"BIFScores: no query {query!r}; choose one of {', '.join(map(repr, names))}")
        return names.index(query)

    def top(self, k: int = 10, query: str | None = None) -> NDArray[np.int64]:
        """Dataset indices of the ``k`` most helpful rows, best first."""
        return self.rows[np.argsort(-self.ranking[:, self.column(query)], kind="stable")][:k]

    def bottom(self, k: int = 10, query: str | None = None) -> NDArray[np.int64]:
        """Dataset indices of the ``k`` most harmful rows, worst first."""
        return self.rows[np.argsort(self.ranking[:, self.column(query)], kind="stable")][:k]


def example_bif_scores() -> BIFScores:
    """Five rows on one query, for examples."""
    scores = np.array([[0.1], [0.5], [-0.3], [0.0], [0.9]])
    flat = np.full((5, 1), 0.1)
    info = QueryInfo("val", "loss", "Does training on this row lower the mean loss on the validation set?")
    screen = Screen("drift", 0.1, "below 0.5", True, "raise burn_in")
    sd, loss = np.ones(5), np.zeros((2, 3))
    none, many = np.zeros((5, 1)), np.full((5, 1), 400.0)
    errors = (flat, flat, flat, scores, flat, scores, none, many)
    return BIFScores(np.arange(5), (info,), scores, *errors, sd, sd[:1], loss, (screen,))
