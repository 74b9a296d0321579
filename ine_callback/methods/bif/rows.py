"""Training rows for the chains: a batch, the weight of each row in the training's loss, and how to get row losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.data.batches import cut, led_by, size_of
from ine_callback.errors import RowsError

Batch = Any
MAX_PASS_ROWS = 256
SAMPLE_ROWS = 64  # on which row losses are verified
REMEDY = "pass loss_fn=lambda module, batch: losses of shape [rows], or give the module a method influence_loss(batch)"
WHOLE_BATCH_NOTE = (
    "the training rows cannot be cut out of their batch (graphs?): their losses are read from one pass of the whole "
    "batch, and every step of the chains takes all of them"
)
# what a step may raise for rows cut out of a batch that cannot be cut
CUT_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch. They can be cut out of it, or are read from one pass of the whole batch.

    Attributes:
        batch: The batch.
        size: Number of rows of the batch.
        weights: Weight of each row [b]: the mean of ``weights * losses`` over all rows is the training's loss.
        term_weights: Weight of each term in its row's loss [b, T], where losses come from a standard loss's terms.
        picked: Places of these rows in a batch that cannot be cut [b] (graphs, whose nodes are concatenated).
    """

    batch: Batch
    size: int
    weights: Tensor
    term_weights: Tensor | None = None
    picked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows."""
        rows = rows.to(self.weights.device)
        term_weights = None if self.term_weights is None else self.term_weights[rows]
        found = replace(self, weights=self.weights[rows], term_weights=term_weights)
        if self.picked is not None:
            return replace(found, picked=self.picked[rows])
        return replace(found, batch=cut(self.batch, rows, self.size), size=len(rows))

    def split(self, max_rows: int) -> list[Rows]:
        """Pieces of at most ``max_rows`` rows; one piece where each would need a pass of the whole batch."""
        if self.picked is not None or len(self) <= max_rows:
            return [self]
        # of equal size, because a last piece of one row may lose its dimension in the module
        return [self.take(rows) for rows in torch.arange(len(self)).tensor_split(-(-len(self) // max_rows))]


class RowLosses(ABC):
    """Losses [b] of rows: ``losses(module, losses.rows(module, batch))``.

    Attributes:
        note: What the report says about where the losses come from.
        whole: Whether batches cannot be cut into rows.
    """

    note: str | None = None
    whole = False

    @abstractmethod
    def rows(self, module: nn.Module, batch: Batch, max_rows: int = MAX_PASS_ROWS, count: int | None = None) -> Rows:
        """A batch as rows, with their weights.

        Args:
            module: The module.
            batch: The batch.
            max_rows: Greatest number of rows of a pass.
            count: Rows of the batch, where known.

        Raises:
            InfluenceError: If a row's loss is not finite, or its weight is unknown.
        """

    @abstractmethod
    def terms(self, module: nn.Module, rows: Rows) -> Tensor:
        """What each term (the token of a sequence) adds to its row's loss [b, T]; T is 1 for rows of one term."""

    def __call__(self, module: nn.Module, rows: Rows) -> Tensor:
        return self.terms(module, rows).sum(1)

    def contributions(self, module: nn.Module, rows: Rows) -> Tensor:
        """The rows' contributions [b] to the training's loss, which is their mean."""
        return rows.weights * self(module, rows)


def rows_in(batch: Batch, count: int | None = None) -> int | None:
    """Number of rows that can be cut out of a batch: ``count``, else the first tensor's length; None where none can."""
    try:
        size = size_of(batch) if count is None else count
    except RowsError:
        return None
    return size if size and led_by(batch, size) else None


def spread(size: int, limit: int) -> Tensor:
    """At most ``limit`` of ``size`` rows, evenly spaced, because neighbours are often alike.

    Example:
        >>> spread(9, 3), spread(2, 3)
        (tensor([0, 3, 6]), tensor([0, 1]))
    """
    few = min(size, limit)
    return torch.arange(few) * size // few


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether rows' losses [b] are equal to rounding; passes of unlike size add up in different order."""
    scale = max(float(expected.abs().mean()), 1e-6)
    half = expected.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(expected.device.type)
    return bool(((found - expected).abs() <= (5e-2 if half else 1e-3) * scale).all())
