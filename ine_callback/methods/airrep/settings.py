"""Settings of AirRep that need no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ine_callback.errors import InfluenceError
from ine_callback.utilities.options import check_count

NAME = "AirRep"
FEWEST = 30  # subsets, and of these at least 8 to judge on
Pooling = Literal["attention", "mean"]


@dataclass(frozen=True)
class AirRepSettings:
    """How the encoder is trained and judged.

    Attributes:
        subsets: Subsets of the training rows on which the model is trained anew, at least 30.
        size: Rows of a subset: a number, or below 1 a fraction of all rows. Scores are calibrated for groups of this
            size, so take the size that you will ask about.
        pooling: What a subset's representation is: ``"attention"`` weighs its rows by the softmax of their |score|, as
            published; ``"mean"`` weighs them alike, and scores then add up.
        steps: Optimizer steps of the encoder.
        seeds: Trainings of each subset, with the seeds 0 to ``seeds - 1``; their losses are averaged. From 2 on the
            noise ceiling is measured.
        held_out: Fraction of the subsets, and of the dev rows, that judge the encoder and never train it.
        learning_rate: AdamW's, for the encoder.
        rows_at_once: Rows that the encoder sees at once with gradients; the gradient cache keeps the gradient exact.
        seed: Of the subsets that are drawn, of the split, and of the encoder's training.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> AirRepSettings(subsets=12)
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: AirRep: subsets=12 are too few to learn from and judge on; give at least 30.
    """

    subsets: int = 300
    size: float = 0.06
    pooling: Pooling = "attention"
    steps: int = 400
    seeds: int = 1
    held_out: float = 0.25
    learning_rate: float = 1e-3
    rows_at_once: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("subsets", "steps", "seeds", "rows_at_once"):
            check_count(NAME, name, getattr(self, name))
        if self.subsets < FEWEST:
            raise InfluenceError(
                f"{NAME}: subsets={self.subsets} are too few to learn from and judge on; give at least {FEWEST}."
            )
        if not _is_number(self.size) or not self.size > 0 or (self.size >= 1 and self.size != int(self.size)):
            raise InfluenceError(f"{NAME}: size={self.size!r} must be a number of rows, or a fraction between 0 and 1.")
        if self.pooling not in get_args(Pooling):
            raise InfluenceError(f'{NAME}: pooling={self.pooling!r} is none; choose "attention" or "mean".')
        if not (_is_number(self.held_out) and 0.1 <= self.held_out <= 0.9):
            raise InfluenceError(f"{NAME}: held_out={self.held_out!r} must be a fraction between .1 and .9.")
        if not (_is_number(self.learning_rate) and self.learning_rate > 0):
            raise InfluenceError(f"{NAME}: learning_rate={self.learning_rate!r} must be above 0.")

    def rows_of(self, total: int) -> int:
        """Rows of a subset, of ``total`` training rows.

        Raises:
            InfluenceError: If that leaves fewer than 2 rows, or more than there are.
        """
        rows = int(self.size) if self.size >= 1 else round(self.size * total)
        if not 2 <= rows < total:
            raise InfluenceError(
                f"{NAME}: size={self.size!r} makes subsets of {rows} of {total} rows; give a size of at least 2 rows, "
                "and fewer than there are."
            )
        return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
