"""The score of a set of rows, and its trade-off curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ine_callback.scores import Attribution, Scores
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


@dataclass(frozen=True)
class NewtonGroup:
    """Effect of leaving a set S of rows out on one query, by influence functions; in the query's own unit.

    Attributes:
        query: Name of the query.
        size: Number of rows in S.
        method: The method that computed it.
        first_order: Sum of the rows' scores; NaN where one of them was not scored.
        newton: By the Newton step of the whole set, which knows that its rows stand in for each other.

    Example:
        >>> NewtonGroup("val", 40, "IF-EXACT", first_order=0.1, newton=0.3).newton
        0.3
    """

    query: str
    size: int
    method: str
    first_order: float
    newton: float


def newton_group(
    attributions: Sequence[Attribution], rows: Iterable[int] | NDArray[Any], query: str | None
) -> NewtonGroup:
    """See :meth:`InfluenceReport.newton_group`."""
    wanted = {int(row) for row in rows}
    for found in attributions:
        column = found.column(query)
        for name, group in found.settings.get("groups", {}).items():
            if set(group) == wanted:
                known = dict(zip(found.rows.tolist(), found.scores[:, column], strict=True))
                total = float(sum(known.get(row, math.nan) for row in wanted))
                newton = float(found.arrays[f"newton {name}"][column])
                return NewtonGroup(found.queries[column].name, len(wanted), found.method, total, newton)
    raise ValueError(
        f"InfluenceReport.newton_group: no method took a Newton step of these {len(wanted)} rows; pass "
        "methods=[FINE(), IF(groups={'mine': rows})], or add what run_if(trainer, module, IF(groups=...)) returns with "
        "report.with_attributions(found)."
    )


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
