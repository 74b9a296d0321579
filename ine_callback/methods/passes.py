"""Requests for passes over the training rows, made by methods that run on the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ine_callback.errors import InfluenceError

Labels = Literal["true", "sampled", "expected"]


@dataclass(frozen=True)
class PerSamplePass:
    """One pass over training rows that hands out every row's gradient. Equal ones are made once for all who ask.

    Args:
        labels: ``"true"``: gradients of the rows' own losses. ``"sampled"``: of losses whose labels are drawn from the
            model's prediction. ``"expected"``: every row comes once for each class c, its gradient times the square
            root of the predicted probability, so that the squares' sum is the expectation over labels. Where numbers
            or bits are predicted, it comes once for each of them.
        rows: Dataset indices; None: all.
        draw: Another number draws other labels.
    """

    labels: Labels = "true"
    rows: Sequence[int] | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise InfluenceError(f"PerSamplePass: labels={self.labels!r} is none of {', '.join(get_args(Labels))}.")
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
