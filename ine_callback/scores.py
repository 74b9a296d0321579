"""What a method hands to the report: one number per row and query, with its tests. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

QueryKind = Literal["loss", "margin", "self", "custom"]
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
