"""The batches of the last pass over the rows, for a closing pass where rows cannot be read by their index."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

MAX_BYTES = 2**28  # of tensors in the batches


class RecentBatches:
    """Holds batches as the training step got them, until all of their rows have come again.

    Args:
        wanted: Whether to hold any.

    Attributes:
        missing: Why they do not hold every row; empty where they do.

    Example:
        >>> import torch
        >>> recent = RecentBatches(wanted=True)
        >>> for rows in torch.arange(4).repeat(3).split(2):
        ...     recent.add(rows, rows * 10.0, known=4)
        >>> [rows.tolist() for rows, batch in recent.batches()]
        [[0, 1], [2, 3]]
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.missing = wanted, ""
        self._held: deque[tuple[Tensor, Any, int, list[int]]] = deque()  # rows, batch, bytes, versions
        self._rows = self._bytes = 0

    def add(self, rows: Tensor, batch: Any, known: int) -> None:
        """Holds one batch, and lets go of those before the last ``known`` rows."""
        if not self.wanted or self.missing:
            return
        size = sum(leaf.nbytes for leaf in _tensors(batch))
        self._held.append((rows, batch, size, _versions(batch)))
        self._rows, self._bytes = self._rows + len(rows), self._bytes + size
        while self._rows - len(self._held[0][0]) >= known:
            oldest, _, freed, _ = self._held.popleft()
            self._rows, self._bytes = self._rows - len(oldest), self._bytes - freed
        if batch is None:
            self._drop("the batches were not given to Recorder.batch(rows, data)")
        elif self._bytes > MAX_BYTES:
            self._drop(f"the rows' batches take more than {MAX_BYTES / 2**20:.0f} MB")

    def batches(self) -> list[tuple[Tensor, Any]]:
        """Pairs of dataset indices [b] and batches, in the order of training; none if some were overwritten since."""
        if any(_versions(batch) != versions for _, batch, _, versions in self._held):
            self._drop("batches were changed in place after their step, so they no longer hold their rows")
        return [(rows, batch) for rows, batch, *_ in self._held]

    def _drop(self, why: str) -> None:
        self.missing = why
        self._held.clear()


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def _versions(batch: Any) -> list[int]:
    """Counts of in-place changes; a loop may load every batch into the same tensors."""
    return [0 if leaf.is_inference() else leaf._version for leaf in _tensors(batch)]
