"""The result of the chains: an :class:`Attribution` with the covariances of row losses and queries.

Columns beside the score, each [R, Q]:

    plain, plain_se     the chains' own covariance, the published estimator, and its standard error
    laplace             covariance under the quadratic posterior, gᵢᵀ V v: no noise, but only to first order (NaN
                        without a control-variate chain)
    shrunk              scores shrunk towards the Laplace term, the more the noisier they are
    trend               part of ``plain`` that comes from a linear trend of both loss and query over the draws
    effective_draws     effective number of draws behind ``plain``
    correlation         scores divided by both standard deviations: comparable between rows and queries, not additive
    correlation_se      its standard error

Arrays: ``row_sd`` [R] and ``query_sd`` [Q], standard deviations over the draws; ``loss`` [C, T], mean loss of the rows
at every draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.scores import Attribution, Check, Floats, QueryInfo, Stage, TokenScores

NAME, TITLE = "BIF", "Bayesian influence"
MIN_EFFECTIVE_DRAWS = 50.0
MIN_UNTRENDED = 0.7  # fraction of a covariance that is left without the linear trend
LEGEND = (
    "BIF > 0: training on the row lowers the query. It is the {what} of the row's loss and the query over the chains; "
    '± is its Monte-Carlo error, and q tests "the covariance is 0" in this posterior, not over other trainings. ? '
    "marks a score that is mostly common drift, or has fewer than 50 effective draws behind it."
)
# the public name of the result; the results of all fit-end methods have this one form
BIFScores = Attribution


def attribution(
    rows: NDArray[np.int64],
    queries: tuple[QueryInfo, ...],
    *,
    scores: Floats,
    se: Floats,
    p: Floats,
    q: Floats,
    plain: Floats,
    plain_se: Floats,
    laplace: Floats,
    trend: Floats,
    effective_draws: Floats,
    row_sd: Floats,
    query_sd: Floats,
    loss: Floats,
    checks: tuple[Check, ...],
    settings: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    at: Stage = "end",
    tokens: TokenScores | None = None,
) -> Attribution:
    """The chains' result as an attribution; see the top of the file for the arrays."""
    settings = dict(settings or {})
    scale = row_sd[:, None] * query_sd
    unknown = np.full_like(scores, np.nan)
    correlation, correlation_se = (np.divide(x, scale, out=unknown.copy(), where=scale > 0) for x in (scores, se))
    normalized = bool(settings.get("normalized"))
    columns = {
        "plain": plain,
        "plain_se": plain_se,
        "laplace": laplace,
        "shrunk": shrunk(scores, se, laplace),
        "trend": trend,
        "effective_draws": effective_draws,
        "correlation": correlation,
        "correlation_se": correlation_se,
    }
    return Attribution(
        NAME,
        rows,
        queries,
        scores,
        se,
        p,
        q,
        columns=columns,
        ranked_by="correlation" if normalized else "",
        doubtful=doubtful(plain, plain_se, trend, effective_draws),
        tokens=tokens,
        checks=checks,
        settings=settings,
        arrays={"row_sd": row_sd, "query_sd": query_sd, "loss": loss},
        notes=notes,
        title=TITLE,
        headline=headline(loss, len(rows), settings),
        legend=LEGEND.format(what="correlation" if normalized else "covariance"),
        at=at,
    )


def doubtful(plain: Floats, plain_se: Floats, trend: Floats, effective_draws: Floats) -> NDArray[np.bool_]:
    """Pairs of row and query [R, Q] that are not to be trusted, even where the run passes all checks.

    Of such a pair more than 30 % of the covariance is common drift, beyond two standard errors, or it has fewer than 50
    effective draws.
    """
    drifting = np.abs(trend) > np.fmax((1 - MIN_UNTRENDED) * np.abs(plain), 2 * plain_se)
    return np.asarray(drifting | (effective_draws < MIN_EFFECTIVE_DRAWS))


def shrunk(scores: Floats, se: Floats, laplace: Floats) -> Floats:
    """Scores shrunk towards the Laplace term, the more the noisier they are [R, Q]: biased, with less error.

    laplace + k (scores − laplace), k = 1 − mean(se²) / mean((scores − laplace)²) per query, at least 0 (James and Stein
    1961). Without a Laplace term nothing is shrunk.
    """
    difference = scores - laplace
    if np.isnan(difference).all():
        return scores
    factor = np.clip(1 - (se**2).mean(0) / np.maximum((difference**2).mean(0), np.finfo(np.float64).tiny), 0, 1)
    return np.asarray(laplace + factor * difference, dtype=np.float64)


def headline(loss: Floats, rows: int, settings: Mapping[str, Any]) -> str:
    """One line with the numbers of the run."""
    chains, draws = loss.shape
    return (
        f"{chains} chains x {draws} draws · {rows:,} rows · step {settings.get('step_size', 0):.3g} · "
        f"n_beta {settings.get('n_beta', 0):g} · localization {settings.get('localization', 0):.3g}"
    )


def example_bif_scores() -> Attribution:
    """Five rows on one query, for examples."""
    scores = np.array([[0.1], [0.5], [-0.3], [0.0], [0.9]])
    flat, none, many = np.full((5, 1), 0.1), np.zeros((5, 1)), np.full((5, 1), 400.0)
    info = QueryInfo("val", "loss", "Does training on this row lower the mean loss on the validation set?")
    check = Check("drift", 0.1, "below 0.5", True, "raise burn_in")
    return attribution(
        np.arange(5), (info,), scores=scores, se=flat, p=flat, q=flat, plain=scores, plain_se=flat, laplace=scores,
        trend=none, effective_draws=many, row_sd=np.ones(5), query_sd=np.ones(1), loss=np.zeros((2, 3)),
        checks=(check,),
    )  # fmt: skip
