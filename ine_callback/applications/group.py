"""The score of a set of rows, and its trade-off curve."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ine_callback.scores import Scores
from ine_callback.stats.tradeoff import tradeoff
from ine_callback.utilities.validate import listed, row_ids


@dataclass(frozen=True)
class GroupScore:
    """Influence of a set S of rows on one query; scores are additive, ``mu_S = sum of mu_i`` over S.

    Attributes:
        query: Name of the query.
        size: Number of rows in S.
        mu: Gaussian influence of S; > 0: training on S lowers the query (helpful).
        null_sd: Standard deviation of ``mu`` under the null, ``sqrt(sum of null_sd_i ** 2)``. Rows of a batch compete,
            so it is somewhat too large (the test conservative) when S is a large part of the training set.
        z: ``mu / null_sd``.
        p: Two-sided normal p-value of ``z``.

    Example:
        >>> group = GroupScore(query="val", size=2, mu=1.0, null_sd=0.5, z=2.0, p=0.0455)
        >>> round(float(group.errors(0.05)), 3)
        0.74
    """

    query: str
    size: int
    mu: float
    null_sd: float
    z: float
    p: float

    def errors(self, alpha: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Smallest type-II error of a test that tells training with S from training without S.

        ``G_mu(alpha) = Phi(Phi^-1(1 - alpha) - |mu|)`` (f-INE, arXiv 2510.10510; Gaussian trade-off of
        Dong, Roth and Su 2022). Equal to ``1 - alpha`` when S has no influence.

        Args:
            alpha: Type-I error, within [0, 1], any shape.

        Returns:
            Type-II error, of the shape of ``alpha``.
        """
        level = np.asarray(alpha, dtype=np.float64)
        if not bool(np.all((level >= 0.0) & (level <= 1.0))):
            raise ValueError(f"GroupScore.errors: alpha is {alpha}; give type-I errors between 0 and 1")
        return tradeoff(self.mu, level)

    def curve(self, points: int = 101) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The trade-off curve: ``points`` type-I errors from 0 to 1 and their smallest type-II errors.

        Example:
            >>> alpha, beta = GroupScore("val", 1, mu=0.0, null_sd=1.0, z=0.0, p=1.0).curve(3)
            >>> alpha.tolist(), beta.tolist()
            ([0.0, 0.5, 1.0], [1.0, 0.5, 0.0])
        """
        if points < 2:
            raise ValueError(f"GroupScore.curve: points is {points}; a curve needs at least 2")
        alpha = np.linspace(0.0, 1.0, points)
        return alpha, self.errors(alpha)


def group_score(scores: Scores, rows: Iterable[int] | NDArray[Any], column: int) -> GroupScore:
    """See :meth:`InfluenceReport.group`."""
    who = "InfluenceReport.group"
    ids = row_ids(rows, len(scores.observations), who)
    mu = scores.mu[ids, column]
    if not np.isfinite(mu).all():
        missing = ids[~np.isfinite(mu)]
        raise ValueError(f"{who}: row {listed(missing)} never observed or without a score; leave out report.unseen")
    total, sd = float(mu.sum()), float(np.sqrt(np.square(scores.null_sd[ids, column]).sum()))
    z = total / sd if sd > 0 else math.nan
    return GroupScore(scores.queries[column].name, ids.size, total, sd, z, float(2.0 * ndtr(-abs(z))))
