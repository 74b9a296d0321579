"""What fair subspaces take as target and sensitive attribute: a class or a number for each row, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.fairness.settings import WHO
from ine_callback.stats.sufficient_dimension import quantile_slices

GROUP_ROWS, CLASS_ROWS = 30, 10  # that a group and a class must have
CLASSES = 20  # different whole numbers in a float array that are classes still


@dataclass(frozen=True)
class Variable:
    """A target or an attribute of n rows.

    Attributes:
        slices: Its classes, or slices of its numbers, one-hot [n, H].
        names: Of the classes or slices.
        numbers: [n]; None where they are classes.
    """

    slices: Tensor
    names: tuple[str, ...]
    numbers: Tensor | None

    @property
    def counts(self) -> Tensor:
        """Rows of each class or slice [H]."""
        return self.slices.sum(0)


def as_array(values: Any, count: int, what: str) -> NDArray[Any]:
    """One value for each row [n].

    Raises:
        InfluenceError: If there are none, or not one for each row.
    """
    if values is None:
        raise InfluenceError(f"{WHO}: the {what} is missing; name it by a batch's key or position, or give a function.")
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if found.shape != (count,) or found.dtype.kind not in "iubfUO":
        raise InfluenceError(
            f"{WHO}: the {what} is {found.dtype} of shape {found.shape}; give one class or number for each of the "
            f"{count} rows."
        )
    return found


def missing(values: NDArray[Any], below_zero: bool) -> NDArray[np.bool_]:
    """Which rows have no value [n]: NaN or None, and where that is asked an integer below 0."""
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values))
    if values.dtype.kind == "O":
        return np.array([value is None or value != value for value in values], dtype=bool)
    return np.asarray(values < 0) if below_zero and values.dtype.kind == "i" else np.zeros(len(values), bool)


def variable(values: NDArray[Any], slices: int, what: str, least: int) -> Variable:
    """Classes or slices of values that are all there.

    Args:
        values: [n].
        slices: Quantile slices of numbers.
        what: Named in messages.
        least: Rows that each class must have.

    Raises:
        InfluenceError: If it is constant, or a class has too few rows.
    """
    if values.dtype.kind == "O":
        values = values.astype(str)
    distinct = np.unique(values)
    whole = values.dtype.kind != "f" or (len(distinct) <= CLASSES and np.array_equal(distinct, np.round(distinct)))
    if len(distinct) < 2:
        raise InfluenceError(
            f"{WHO}: the {what} is the same for all {len(values):,} rows; there is nothing to compare."
        )
    if whole:
        named = distinct.astype(np.int64) if values.dtype.kind == "f" else distinct
        codes = torch.from_numpy(np.searchsorted(distinct, values))
        names = tuple(map(str, named))
    else:
        codes = quantile_slices(torch.from_numpy(values.astype(np.float64)), slices)
        names = tuple(f"slice {k + 1}" for k in range(int(codes.max()) + 1))
    counts = torch.bincount(codes, minlength=len(names))
    if int(counts.min()) < least:
        k = int(counts.argmin())
        raise InfluenceError(
            f"{WHO}: {names[k]!r} of the {what} has {int(counts[k])} rows, fewer than {least}; merge it with another, "
            "or leave its rows out."
        )
    numbers = None if whole else torch.from_numpy(values.astype(np.float64))
    return Variable(torch.eye(len(names), dtype=torch.float64)[codes], names, numbers)
