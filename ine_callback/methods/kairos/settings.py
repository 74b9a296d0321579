"""Settings of KAIROS that need no training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ine_callback.errors import InfluenceError

NAME = "KAIROS"


@dataclass(frozen=True)
class KAIROSSettings:
    """How values are computed.

    Attributes:
        sigma: Bandwidth of the Gaussian kernel in the features' unit; ``"median"``: the median distance of two
            reference rows.
        lam: λ, weight of the features; 1 − λ is that of the labels. The published .97: distances of distributions are
            of the order of .01, residuals of 1. With 1 no labels are needed.
        loo: Exact leave-one-out values; else first-order ones, as published. They cost the same.
        random_features: Frequencies that approximate the kernel, in time linear in the rows; None: exact.
        seed: Of the split of the reference, of the rows for the median and of the frequencies.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> KAIROSSettings(sigma=0)
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: KAIROS: sigma=0 is no bandwidth; give a number above 0, or "median".
    """

    sigma: float | str = "median"
    lam: float = 0.97
    loo: bool = True
    random_features: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sigma != "median" and not (_is_number(self.sigma) and 0 < float(self.sigma) < math.inf):
            raise InfluenceError(f'{NAME}: sigma={self.sigma!r} is no bandwidth; give a number above 0, or "median".')
        if not (_is_number(self.lam) and 0 <= self.lam <= 1):
            raise InfluenceError(f"{NAME}: lam={self.lam!r} must be between 0 (labels alone) and 1 (features alone).")
        count = self.random_features
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InfluenceError(
                f"{NAME}: random_features={count!r} must be a number of frequencies, such as 1024, or None (exact)."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
