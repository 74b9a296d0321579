"""A query bound to its data, and where queries get their data from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ine_callback.data.batches import size_of
from ine_callback.scores import QueryInfo

Batch = Any
Value = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class BoundQuery:
    """A query with its data: phi = sum over batches of weight * value(module, batch).

    Attributes:
        info: Name, kind and question.
        value: Scalar tensor of a batch, lower is better.
        batches: Pairs of a weight (they sum to one) and a batch.
    """

    info: QueryInfo
    value: Value
    batches: tuple[tuple[float, Batch], ...]


class QuerySource(ABC):
    """Where queries get their data and the module's own loss from; the callback and the recorder implement it.

    Attributes:
        notes: What the report should say about the data.
    """

    notes: list[str]

    @abstractmethod
    def batches(self, data: Any) -> list[Batch]:
        """The batches that ``data`` names: ``"val"``, a loader, a batch, or a list of dataset indices.

        Raises:
            QueryError: If there is no such data or it is empty.
        """

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The module's own mean loss of a batch."""

    def size(self, batch: Batch) -> int:
        """Number of rows of one of the batches."""
        return size_of(batch)
