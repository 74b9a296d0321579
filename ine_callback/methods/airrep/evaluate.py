"""How well scores rank held-out subsets for held-out queries: the linear data-modelling score, and what bounds it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from ine_callback.scores import Floats

DRAWS, LEVEL = 400, 0.95


@dataclass(frozen=True)
class Evaluation:
    """The linear data-modelling score (LDS) on queries and subsets that the encoder was not trained on.

    Attributes:
        lds: Mean over queries of Spearman's correlation of scores and helpfulness over subsets.
        interval: Its 95 % bootstrap interval, over queries and subsets at once.
        untrained: LDS of the encoder before its training.
        gain_interval: 95 % interval of ``lds - untrained``, paired.
        raw: LDS of the inner products of the encoder's fixed features, pooled likewise; NaN where it has none.
        ceiling: LDS that the expected losses themselves would have; 1 with one seed, for there is no noise then, if the
            training is deterministic.
        queries: Held-out queries.
        subsets: Held-out subsets.
        dropped: Dev rows left out, for their loss was the same after every training.

    Example:
        >>> Evaluation(0.5, (0.4, 0.6), 0.1, (0.3, 0.5), 0.3, 0.8, 100, 100, 0).usable
        True
    """

    lds: float
    interval: tuple[float, float]
    untrained: float
    gain_interval: tuple[float, float]
    raw: float
    ceiling: float
    queries: int
    subsets: int
    dropped: int

    @property
    def usable(self) -> bool:
        """Whether training the encoder has gained anything beyond chance."""
        return self.gain_interval[0] > 0

    def __str__(self) -> str:
        ceiling = "seeds do not agree" if math.isnan(self.ceiling) else f"{self.lds / self.ceiling:.0%} of the ceiling"
        raw = "" if math.isnan(self.raw) else f", raw features {self.raw:.3f}"
        return (
            f"held-out LDS {self.lds:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}], {ceiling} "
            f"{self.ceiling:.3f}; untrained encoder {self.untrained:.3f}{raw} · {self.queries:,} queries, "
            f"{self.subsets:,} subsets"
        )


def per_query(scores: Floats, truth: Floats) -> Floats:
    """Spearman's correlation over subsets for each query [Q], of [Q, M] with [Q, M]; 0 where scores are constant.

    >>> per_query(np.array([[1.0, 2.0, 5.0]]), np.array([[0.0, 1.0, 2.0]]))
    array([1.])
    """
    a, b = (rankdata(each, axis=1) for each in (scores, truth))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return np.asarray((a * b).sum(1) / np.where(size > 0, size, 1), dtype=np.float64)


def lds(scores: Floats, truth: Floats) -> float:
    """Linear data-modelling score: the mean of :func:`per_query`."""
    return float(per_query(scores, truth).mean())


def intervals(scores: Floats, untrained: Floats, truth: Floats, seed: int) -> tuple[tuple[float, float], ...]:
    """95 % intervals of the LDS of ``scores``, and of its gain over ``untrained``, all [Q, M].

    Queries and subsets are drawn with replacement at once: queries share the subsets, so resampling queries alone would
    give too short an interval.
    """
    rng = np.random.default_rng(seed)
    found: NDArray[np.float64] = np.empty((DRAWS, 2))
    for draw in found:
        at = np.ix_(*(rng.integers(0, n, n) for n in truth.shape))
        with_, without = (lds(each[at], truth[at]) for each in (scores, untrained))
        draw[:] = with_, with_ - without
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


def noise_ceiling(losses: Floats) -> float:
    """LDS of the expected losses with the mean over seeds, from losses [M, seeds, Q]: the root of its reliability.

    The reliability of one seed is the mean Spearman's correlation of two seeds over subsets; that of the mean of k
    seeds follows by Spearman-Brown, k r / (1 + (k − 1) r). NaN where seeds do not agree at all.

    >>> noise_ceiling(np.random.default_rng(0).normal(size=(40, 1, 5)))
    1.0
    """
    seeds = losses.shape[1]
    if seeds == 1:
        return 1.0
    pairs = itertools.combinations(range(seeds), 2)
    one = float(np.mean([lds(losses[:, i].T, losses[:, j].T) for i, j in pairs]))
    return math.sqrt(seeds * one / (1 + (seeds - 1) * one)) if one > 0 else math.nan
