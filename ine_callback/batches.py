"""Batches of any structure, seen as rows along the leading dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ine_callback.errors import RowsError


def size_of(batch: Any) -> int:
    """Number of rows: the leading dimension of the first tensor (or the length of the first list) found.

    Raises:
        RowsError: If there is neither.

    Example:
        >>> import torch
        >>> size_of({"ids": torch.zeros(3, 7), "text": ["a", "b", "c"]})
        3
    """
    size = _first_size(batch)
    if size is None:
        raise RowsError(f"a batch of type {type(batch).__name__} holds no tensor to count rows by; pass row_fn=.")
    return size


def _first_size(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, list | tuple):
        if batch and all(isinstance(part, str | int | float) for part in batch):
            return len(batch)
        parts = list(batch)
    elif hasattr(batch, "__dataclass_fields__"):
        parts = [getattr(batch, name) for name in batch.__dataclass_fields__]
    else:
        return None
    return next((size for part in parts if (size := _first_size(part)) is not None), None)


def cut(batch: Any, rows: Tensor, size: int) -> Any:
    """The given rows of a batch of ``size`` rows; parts without a row dimension stay whole.

    Example:
        >>> import torch
        >>> cut((torch.arange(4), "name"), torch.tensor([0, 2]), 4)
        (tensor([0, 2]), 'name')
    """
    if isinstance(batch, list) and len(batch) == size and all(isinstance(part, str | int | float) for part in batch):
        return [batch[int(k)] for k in rows]
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)([cut(part, rows, size) for part in batch])
    if isinstance(batch, dict):
        return {key: cut(part, rows, size) for key, part in batch.items()}

    def pick(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.dim() and tensor.shape[0] == size else tensor

    return apply_to_collection(batch, Tensor, pick)


def micro_batches(batch: Any, largest: int) -> list[Any]:
    """A batch in pieces of at most ``largest`` rows."""
    size = size_of(batch)
    if size <= largest:
        return [batch]
    return [cut(batch, rows, size) for rows in torch.arange(size).split(largest)]
