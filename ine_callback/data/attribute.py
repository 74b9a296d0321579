"""A value of each row of a batch, such as a sensitive attribute: by key or position, or by a function of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ine_callback.errors import InfluenceError

Attribute = int | str | Callable[[Any], Any]


def attribute_of(batch: Any, named: Attribute, size: int, owner: str) -> Tensor:
    """One number for each row of a batch [size].

    Args:
        batch: Any.
        named: Key or position in the batch, or a function of it.
        size: Number of rows.
        owner: Class and option named in messages.

    Raises:
        InfluenceError: If the batch has no such value, or it is not one for each row.

    Example:
        >>> import torch
        >>> attribute_of({"x": torch.zeros(2, 3), "group": torch.tensor([0, 1])}, "group", 2, "Query.gap")
        tensor([0, 1])
    """
    try:
        found = named(batch) if callable(named) else batch[named]
    except (KeyError, IndexError, TypeError) as error:
        raise InfluenceError(
            f"{owner}={named!r}: a batch of type {type(batch).__name__} has nothing there "
            f"({type(error).__name__}: {error}); name a key or a position of the batch, or pass a function of it."
        ) from error
    if not isinstance(found, Tensor) or found.shape != (size,):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InfluenceError(
            f"{owner}={named!r}: a batch of {size} rows gives {what}; one number for each row is wanted, such as "
            "lambda batch: batch[0].mean(1) > .5."
        )
    return found.detach()
