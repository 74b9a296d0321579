"""What KAIROS takes as features and labels, and what the reference says about labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.kairos.settings import NAME
from ine_callback.scores import Floats
from ine_callback.stats.logistic import fit_logistic, probabilities
from ine_callback.utilities.validate import listed


class LabelModel:
    """What the reference says about labels: a logistic regression on it alone.

    Args:
        v: Features of the reference rows [M, d].
        y: Their classes [M].
    """

    def __init__(self, v: Floats, y: NDArray[Any]) -> None:
        self.classes, codes = np.unique(y, return_inverse=True)
        self._weights, self._bias = fit_logistic(v, codes, len(self.classes))

    def residuals(self, x: Floats, y: NDArray[Any]) -> tuple[NDArray[np.bool_], Floats]:
        """Which rows' class the reference lacks [n], and ‖y − p̂(x)‖ with y one-hot [n]."""
        if y.dtype.kind != self.classes.dtype.kind and "U" in (y.dtype.kind, self.classes.dtype.kind):
            raise InfluenceError(
                f"{NAME}: labels are {y.dtype} for training rows and {self.classes.dtype} for the reference; use one "
                "kind for both."
            )
        p = probabilities(x, self._weights, self._bias)
        code = np.searchsorted(self.classes, y).clip(max=len(self.classes) - 1)
        absent = self.classes[code] != y
        of_label = np.where(absent, 0.0, p[np.arange(len(y)), code])
        return absent, np.sqrt(np.maximum(np.square(p).sum(1) - 2 * of_label + 1, 0))


def refuse_shared(rows: Sequence[bytes], reference: Iterable[bytes]) -> None:
    """Refuses training rows that the reference has too, bit for bit: the reference would vouch for itself.

    Args:
        rows: :func:`~ine_callback.methods.row_features.digests` of the training rows.
        reference: Those of the reference.

    Raises:
        InfluenceError: Naming the rows.
    """
    there = set(reference)
    if shared := [k for k, digest in enumerate(rows) if digest in there]:
        raise InfluenceError(
            f"{NAME}: training rows {listed(np.array(shared))} are in the reference too, which makes their values "
            "optimistic; leave them out of one."
        )


def labels_of(y: Any, count: int, what: str) -> NDArray[Any]:
    """Labels as an array [n] of integers or texts."""
    if y is None:
        raise InfluenceError(
            f"{NAME}: {what} rows have no labels, and lam below 1 uses them; pass labels, or lam=1 for features alone."
        )
    found = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if found.dtype.kind == "f" and np.array_equal(found, np.round(found)):
        found = found.astype(np.int64)
    if found.shape != (count,) or found.dtype.kind not in "iubUO":
        raise InfluenceError(
            f"{NAME}: labels of {what} rows are {found.dtype} of shape {found.shape}; give one class for each of the "
            f"{count} rows, or lam=1 for features alone."
        )
    return found.astype(str) if found.dtype.kind == "O" else found
