"""Settings of fair subspaces that need no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from ine_callback.errors import InfluenceError
from ine_callback.stats.sufficient_dimension import Reduction

WHO = "FairSubspaces"  # in messages


@dataclass(frozen=True, kw_only=True)
class FairSettings:
    """How subspaces are found.

    Attributes:
        sdr: ``"sir"``, ``"save"`` or ``"dr"`` (:mod:`ine_callback.stats.sufficient_dimension`). SIR sees shifts of the
            mean alone, and with G groups at most G − 1 directions.
        slices: Quantile slices of a target or attribute that is a number.
        target_rank: Directions of the target; None: as many as the permutation tests find.
        sensitive_rank: Directions of the sensitive attribute, likewise.
        permutations: Of each test; no p-value is below 1/(permutations + 1).
        shrinkage: Of the features' covariance towards a multiple of the identity, 0 to 1; None: that of Ledoit and Wolf
            where there are fewer than 10 rows a feature, or a direction rests on a single row, else 0.
        seed: Of the permutations, and of the rows for the distance covariance.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> FairSettings(sdr="pca")
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: FairSubspaces: sdr='pca' is none of 'sir', 'save', 'dr'; choose one.
    """

    sdr: Reduction = "sir"
    slices: int = 10
    target_rank: int | None = None
    sensitive_rank: int | None = None
    permutations: int = 199
    shrinkage: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sdr not in get_args(Reduction):
            choices = ", ".join(map(repr, get_args(Reduction)))
            raise InfluenceError(f"{WHO}: sdr={self.sdr!r} is none of {choices}; choose one.")
        for name, least in (("slices", 2), ("permutations", 19), ("target_rank", 1), ("sensitive_rank", 1)):
            value = getattr(self, name)
            if not (_is_count(value, least) or (value is None and name.endswith("rank"))):
                other = ", or None (tested)" if name.endswith("rank") else ""
                raise InfluenceError(f"{WHO}: {name}={value!r} must be a number of at least {least}{other}.")
        shrinkage: Any = self.shrinkage
        if shrinkage is not None and not (
            isinstance(shrinkage, int | float) and not isinstance(shrinkage, bool) and 0 <= shrinkage <= 1
        ):
            raise InfluenceError(f"{WHO}: shrinkage={shrinkage!r} must be between 0 and 1, or None (Ledoit and Wolf).")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
