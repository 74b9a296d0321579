"""Whether rows of each kind occur with either treatment: what weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ine_callback.effects.estimands import Weighted
from ine_callback.effects.formulas import Floats, effective_size


@dataclass(frozen=True)
class Positivity:
    """How well rows of each kind occur with either treatment, by part of an estimate.

    Attributes:
        largest_weight: About 1 would be the mean.
        effective_size: (Σ w)² / Σ w²: as many equally weighted rows would be as good.
        imbalance: The largest difference between a column's mean in the weighted rows and in those that they stand for,
            in standard deviations; near 0 if the weights are right.
    """

    largest_weight: dict[str, float]
    effective_size: dict[str, float]
    imbalance: dict[str, float]

    @property
    def smallest(self) -> float:
        """The smallest effective sample size."""
        return min(self.effective_size.values())


def positivity(parts: Mapping[tuple[str, frozenset[str]], Sequence[Weighted]]) -> Positivity:
    """What the weights of all folds say, by part of the estimate and adjustment set."""
    weights: dict[str, list[Floats]] = {}
    imbalance: dict[str, float] = {}
    for (name, _), folds in parts.items():
        weight, columns, reference = (np.concatenate(each) for each in zip(*folds, strict=True))
        weights.setdefault(name, []).append(weight)
        imbalance[name] = max(imbalance.get(name, 0.0), largest_difference(weight, columns, reference))
    joined = {name: np.concatenate(each) for name, each in weights.items()}
    largest = {name: float(weight.max()) for name, weight in joined.items()}
    return Positivity(largest, {name: effective_size(weight) for name, weight in joined.items()}, imbalance)


def largest_difference(weight: Floats, columns: Floats, reference: Floats) -> float:
    """Largest difference of a column's weighted means by two weights, in standard deviations.

    Example:
        >>> x = np.array([[-1.0], [1.0]])
        >>> largest_difference(np.array([0.0, 1.0]), x, np.ones(2))
        1.0
    """
    deviation = columns.std(0)
    varying = columns[:, deviation > 0] / deviation[deviation > 0]
    means = [share @ varying / max(share.sum(), 1e-300) for share in (weight, reference)]
    return float(np.abs(means[0] - means[1]).max(initial=0.0))
