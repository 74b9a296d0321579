"""Batches of any structure, seen as rows along the leading dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ine_callback.data.nested import is_jagged, picked
from ine_callback.errors import RowsError


def size_of(batch: Any) -> int:
    """Number of rows: the leading dimension of the first tensor (or the length of the first list) found.

    Batches of torch_geometric have their number of graphs as an attribute.

    Raises:
        RowsError: If there is neither.

    Example:
        >>> import torch
        >>> size_of({"ids": torch.zeros(3, 7), "text": ["a", "b", "c"]})
        3
    """
    size = count_of(batch)
    if size is None:
        raise RowsError(
            f"the rows of a batch of type {type(batch).__name__} cannot be counted: it is no tensor, list, mapping or "
            "dataclass of tensors, and has no num_graphs"
        )
    return size


def count_of(batch: Any) -> int | None:
    """Number of rows; None where :func:`size_of` would raise."""
    return _first_size(batch)


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
    else:  # torch_geometric's batch of graphs
        graphs = getattr(batch, "num_graphs", None)
        return graphs if isinstance(graphs, int) else None
    return next((size for part in parts if (size := _first_size(part)) is not None), None)


def led_by(batch: Any, size: int) -> bool:
    """Whether any part of a batch has ``size`` rows.

    Example:
        >>> import torch
        >>> led_by({"ids": torch.zeros(3, 7)}, 3), led_by({"ids": torch.zeros(3, 7)}, 6)
        (True, False)
    """
    if isinstance(batch, Tensor):
        return batch.dim() > 0 and batch.shape[0] == size
    if isinstance(batch, Mapping):
        return any(led_by(part, size) for part in batch.values())
    if isinstance(batch, list | tuple):
        plain = isinstance(batch, list) and all(isinstance(part, str | int | float) for part in batch)
        return (plain and len(batch) == size) or any(led_by(part, size) for part in batch)
    if _graphs(batch) is not None:
        return _first_size(batch) == size
    return any(led_by(getattr(batch, name), size) for name in getattr(batch, "__dataclass_fields__", ()))


def _graphs(batch: Any) -> Any:
    """The class that puts graphs together to such a batch (torch_geometric's ``Batch``); None for other batches."""
    if not hasattr(batch, "to_data_list"):
        return None
    return next((kind for kind in type(batch).__mro__ if "from_data_list" in vars(kind)), None)


def holds_graphs(batch: Any) -> bool:
    """Whether a batch is of a class that puts graphs together, and can take them apart."""
    return _graphs(batch) is not None


def is_all_led_by(batch: Any, size: int) -> bool:
    """Whether every tensor of a batch has one row each for ``size`` rows, or none at all.

    Example:
        >>> import torch
        >>> nodes, graph_of_node, label = torch.zeros(9, 2), torch.zeros(9), torch.zeros(3)
        >>> is_all_led_by((nodes, graph_of_node, label), 9), is_all_led_by({"x": nodes, "t": torch.tensor(2.0)}, 9)
        (False, True)
    """
    if isinstance(batch, Tensor):
        return batch.dim() == 0 or len(batch) == size
    if batch is None or isinstance(batch, str | bytes | int | float):
        return True
    if isinstance(batch, Mapping):
        return all(is_all_led_by(part, size) for part in batch.values())
    if isinstance(batch, list | tuple):
        return all(is_all_led_by(part, size) for part in batch)
    fields = getattr(batch, "__dataclass_fields__", None)
    return fields is not None and all(is_all_led_by(getattr(batch, name), size) for name in fields)


def cut(batch: Any, rows: Tensor, size: int) -> Any:
    """The given rows of a batch of ``size`` rows; parts without a row dimension stay whole.

    Raises:
        RowsError: If no part has ``size`` rows.

    Example:
        >>> import torch
        >>> cut((torch.arange(4), "name"), torch.tensor([0, 2]), 4)
        (tensor([0, 2]), 'name')
    """
    if not led_by(batch, size):
        raise RowsError(
            f"a batch of type {type(batch).__name__} has no part led by its {size} rows, so none can be cut out"
        )
    return _cut(batch, rows, size)


def _cut(batch: Any, rows: Tensor, size: int) -> Any:
    if isinstance(batch, list) and len(batch) == size and all(isinstance(part, str | int | float) for part in batch):
        return [batch[int(k)] for k in rows]
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)([_cut(part, rows, size) for part in batch])
    if isinstance(batch, dict):
        return {key: _cut(part, rows, size) for key, part in batch.items()}

    graphs = _graphs(batch)
    if graphs is not None:
        each = batch.to_data_list()
        return graphs.from_data_list([each[int(k)] for k in rows])

    def pick(tensor: Tensor) -> Tensor:
        if is_jagged(tensor):
            return picked(tensor, rows) if len(tensor) == size else tensor
        return tensor[rows.to(tensor.device)] if tensor.dim() and tensor.shape[0] == size else tensor

    return apply_to_collection(batch, Tensor, pick)


def lent(batch: Any) -> Any:
    """A copy of a batch for a step that may change it: take labels out of it, write into its tensors.

    Objects of no known structure are copied if they have ``clone``, like batches of torch_geometric; else given as is.

    Example:
        >>> batch = {"ids": torch.zeros(2), "labels": torch.ones(2)}
        >>> copied = lent(batch)
        >>> _ = copied.pop("labels"), copied["ids"].add_(1)
        >>> sorted(batch), batch["ids"]
        (['ids', 'labels'], tensor([0., 0.]))
    """
    known = isinstance(batch, Tensor | list | tuple | Mapping) or hasattr(batch, "__dataclass_fields__")
    try:
        if not known and hasattr(type(batch), "clone"):
            return type(batch).clone(batch)
        return apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)
    except Exception:  # a class of the user's that cannot be made anew
        return batch


def micro_batches(batch: Any, largest: int) -> list[Any]:
    """A batch in pieces of at most ``largest`` rows; whole where it cannot be cut."""
    size = count_of(batch)
    if size is None or size <= largest or not led_by(batch, size):
        return [batch]
    return [cut(batch, rows, size) for rows in torch.arange(size).split(largest)]
