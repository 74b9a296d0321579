"""Rows as chains read them: a batch, what each row's loss counts in the training's, and how to get the losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.data.batches import cut, led_by, size_of
from ine_callback.errors import RowsError

Batch = Any
LARGEST = 256  # rows of a pass that looks at all of them
SAMPLE = 64  # rows on which losses are proved
REMEDY = "pass loss_fn=lambda module, batch: losses of shape [rows], or give the module a method influence_loss(batch)"
AS_IT_IS = (
    "the training rows cannot be cut out of their batch (graphs?): their losses are read from one pass of the batch as "
    "it is, and every step of the chains takes all of them"
)
# what a step may raise where a batch was cut that cannot be
MISCUT = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Rows:
    """Some rows, which can be cut out of their batch, or are read from one pass of the whole of it.

    Attributes:
        batch: The batch.
        size: Rows of the batch.
        weights: What each row's loss counts [b]: the mean of ``weights * losses`` over all rows is the training's loss.
        counts: What each term counts in its row's loss [b, T], where losses are asked for their terms.
        picked: Which rows of the batch are meant [b], where it cannot be cut (graphs, whose nodes are concatenated).
    """

    batch: Batch
    size: int
    weights: Tensor
    counts: Tensor | None = None
    picked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows."""
        rows = rows.to(self.weights.device)
        kept = replace(self, weights=self.weights[rows], counts=None if self.counts is None else self.counts[rows])
        if self.picked is not None:
            return replace(kept, picked=self.picked[rows])
        return replace(kept, batch=cut(self.batch, rows, self.size), size=len(rows))

    def split(self, largest: int) -> list[Rows]:
        """Pieces of at most so many rows; one piece where every piece would take a pass of the whole batch."""
        if self.picked is not None or len(self) <= largest:
            return [self]
        # of even size: a last one of a single row may lose its dimension in the module
        return [self.take(rows) for rows in torch.arange(len(self)).tensor_split(-(-len(self) // largest))]


class RowLosses(ABC):
    """Losses [b] of rows: ``losses(module, losses.rows(module, batch))``.

    Attributes:
        note: What the report should say about where they come from.
        whole: Whether batches cannot be cut into rows.
    """

    note: str | None = None
    whole = False

    @abstractmethod
    def rows(self, module: nn.Module, batch: Batch, largest: int = LARGEST, count: int | None = None) -> Rows:
        """A batch as rows, and what each one's loss counts.

        Args:
            module: The module.
            batch: The batch.
            largest: Rows of a pass.
            count: Rows of the batch, where they are known.

        Raises:
            InfluenceError: If a row's loss is not finite, or what it counts cannot be told.
        """

    @abstractmethod
    def terms(self, module: nn.Module, rows: Rows) -> Tensor:
        """What each term (the token of a sequence) adds to its row's loss [b, T]; T is 1 for rows of one term."""

    def __call__(self, module: nn.Module, rows: Rows) -> Tensor:
        return self.terms(module, rows).sum(1)

    def shares(self, module: nn.Module, rows: Rows) -> Tensor:
        """The rows' shares [b] of the training's own loss, which is their mean."""
        return rows.weights * self(module, rows)


def rows_in(batch: Batch, count: int | None = None) -> int | None:
    """Rows to cut out of a batch: as many as are known, else by its first tensor. None: no part is led by them."""
    try:
        size = size_of(batch) if count is None else count
    except RowsError:
        return None
    return size if size and led_by(batch, size) else None


def spread(size: int, most: int) -> Tensor:
    """At most so many of ``size`` rows, over all of them: neighbours are often alike.

    Example:
        >>> spread(9, 3), spread(2, 3)
        (tensor([0, 3, 6]), tensor([0, 1]))
    """
    few = min(size, most)
    return torch.arange(few) * size // few


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether rows' losses [b] are the same, but for the order in which passes of unlike size add up."""
    scale = max(float(expected.abs().mean()), 1e-6)
    half = expected.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(expected.device.type)
    return bool(((found - expected).abs() <= (5e-2 if half else 1e-3) * scale).all())
