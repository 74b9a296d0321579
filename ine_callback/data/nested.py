"""Nested tensors in the jagged layout: rows of different lengths, whose entries are in memory one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_jagged(x: Any) -> bool:
    """Whether it is a nested tensor in the jagged layout."""
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def is_led(x: Any) -> bool:
    """Whether its dimension of different lengths comes right after the rows, without holes between these."""
    return bool(x._ragged_idx == 1 and x.lengths() is None)


def values_of(x: Tensor) -> Tensor:
    """The entries [n, ...] of all rows; what is not nested as it is."""
    return x.values() if is_jagged(x) else x


def rows_of(x: Tensor) -> Tensor:
    """The row of each entry [n].

    Example:
        >>> rows_of(torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(1, 4)], layout=torch.jagged))
        tensor([0, 0, 1])
    """
    places = torch.arange(len(x.values()), device=x.device)
    offsets: Tensor = x.offsets()  # type: ignore[attr-defined]
    return torch.searchsorted(offsets.to(places.dtype), places, right=True) - 1


def picked(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a nested tensor, in a given order."""
    each = x.unbind()
    return torch.nested.nested_tensor([each[int(k)] for k in rows], layout=torch.jagged)
