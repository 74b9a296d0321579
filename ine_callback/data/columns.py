"""A collated batch of any structure as columns: in each part, one value for each row; and when two values are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Path = tuple[tuple[str, Any], ...]
_ROUNDING = 1e-6
_MAX_DEPTH = 6  # levels of a batch that are read

ROWS, SECOND, ITEMS, JOINED = "rows", "second dimension", "items", "joined"


def layout(
    batch: Any, rows: int, lengths: Sequence[Sequence[int]] = (), fields: bool = True, second: bool = False
) -> dict[Path, str]:
    """Where a batch holds one value for each row, and how.

    Args:
        batch: Any nesting of tensors, arrays, lists, mappings and objects.
        rows: Number of rows.
        lengths: Lengths of the rows, several guesses; a tensor as long as their sum holds them joined.
        fields: Whether a list as long as the batch, each of whose values has rows itself, holds parts and no rows.
        second: Whether rows are the second dimension of a tensor where both are as long.

    Example:
        >>> import torch
        >>> sorted(layout({"x": torch.zeros(3, 2), "name": ["a", "b", "c"], "n": 3}, 3).values())
        ['items', 'rows']
    """
    found: dict[Path, str] = {}
    sums = {sum(each) for each in lengths}

    def walk(part: Any, path: Path) -> None:
        shape = _shape(part)
        if shape is not None:
            both = len(shape) > 1 and shape[1] == rows
            if shape and shape[0] == rows and not (both and second):
                found[path] = ROWS
            elif shape and shape[0] in sums:
                found[path] = JOINED
            elif both:
                found[path] = SECOND
        elif _is_list(part) and len(part) == rows and not (fields and _are_fields(part, rows, lengths)):
            found[path] = ITEMS
        elif len(path) < _MAX_DEPTH:
            for step, inner in _parts(part):
                walk(inner, (*path, step))

    walk(batch, ())
    return found


def column(batch: Any, path: Path, kind: str, lengths: Sequence[Sequence[int]] = ()) -> list[Any] | None:
    """The values of a part that :func:`layout` found, in this batch or another of its structure; None if there is none.

    Args:
        batch: The batch.
        path: Where.
        kind: How.
        lengths: As for :func:`layout`, of this batch.
    """
    part = batch
    for step in path:
        inner = dict(_parts(part))
        if step not in inner:
            return None
        part = inner[step]
    if kind == ITEMS:
        return list(part) if _is_list(part) else None
    if not isinstance(part, Tensor | np.ndarray):
        return None
    if kind == JOINED:
        fitting = [each for each in lengths if sum(each) == len(part)]
        ends: list[int] = np.cumsum(fitting[0]).tolist() if fitting else []
        return [part[end - size : end] for end, size in zip(ends, fitting[0], strict=True)] if fitting else None
    if part.ndim < 1 + (kind == SECOND):
        return None
    return [part[k] for k in range(len(part))] if kind == ROWS else [part[:, k] for k in range(part.shape[1])]


def sizes(batch: Any) -> list[int]:
    """Leading dimensions, and lengths of plain lists, in the order in which they are found."""
    found: list[int] = []

    def walk(part: Any, depth: int) -> None:
        shape = _shape(part)
        if shape is not None:
            found.extend(shape[:1])
        elif _is_list(part) and not any(_shape(each) is not None for each in part):
            found.append(len(part))
        if shape is None and depth < _MAX_DEPTH:
            for _, inner in _parts(part):
                walk(inner, depth + 1)

    walk(batch, 0)
    return found


def leaves(item: Any) -> dict[Path, Any]:
    """The values that an item holds; a list of numbers is one value."""
    found: dict[Path, Any] = {}

    def walk(part: Any, path: Path) -> None:
        inner = [] if _shape(part) is not None or _is_numbers(part) or len(path) >= _MAX_DEPTH else _parts(part)
        if not inner:
            found[path] = part
        for step, each in inner:
            walk(each, (*path, step))

    walk(item, ())
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two values hold the same, but for padding at the front or the end.

    Example:
        >>> import torch
        >>> same(torch.tensor([1.0, 2.0, 0.0, 0.0]), [1, 2]), same(torch.tensor(3), 4)
        (True, False)
    """
    if type(a) is Tensor and type(b) is Tensor and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b):
        return True
    a, b = _tensor(a), _tensor(b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _same_tensors(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if _is_list(a) and _is_list(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    try:
        if bool(a == b):
            return True
    except Exception:  # a comparison of several values
        pass
    space = _space(a)
    return type(a) is type(b) and bool(space) and same(space, _space(b))


def all_same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether all values are the same as their partners."""
    if values and all(isinstance(v, Tensor) and not v.dim() for v in values):  # labels: one comparison for all
        try:
            return same(torch.stack(list(values)), torch.as_tensor(others))
        except (TypeError, ValueError, RuntimeError):
            pass
    return all(same(value, other) for value, other in zip(values, others, strict=True))


def mark(value: Any) -> tuple[Any, Any]:
    """What equal values have in common although one is padded: their first and their last number."""
    value = _tensor(value)
    if isinstance(value, Tensor):
        if not value.numel():
            return (), ()
        flat = value.reshape(-1)
        return float(flat[0]), float(flat[-1])
    return (value, value) if isinstance(value, str | bytes) else ((), ())


def _same_tensors(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        if torch.bool in (a.dtype, b.dtype) or (b.is_floating_point() and not a.is_floating_point()):
            return False
        b = b.to(a.dtype)
    if a.device != b.device:
        b = b.to(a.device)
    if a.numel() == b.numel():
        return _equal(a.reshape(-1), b.reshape(-1))
    if a.dim() != b.dim():
        return False
    large, small = (a, b) if a.numel() > b.numel() else (b, a)
    if not small.numel() or any(x < y for x, y in zip(large.shape, small.shape, strict=True)):
        return False
    front = tuple(slice(0, size) for size in small.shape)
    back = tuple(slice(whole - size, whole) for whole, size in zip(large.shape, small.shape, strict=True))
    return any(
        _equal(large[place], small) and _constant_but(large, place, large.reshape(-1)[corner])
        for place, corner in ((front, -1), (back, 0))
    )


def _constant_but(large: Tensor, place: tuple[slice, ...], filling: Tensor) -> bool:
    padded = torch.zeros_like(large) + filling
    padded[place] = large[place]
    return _equal(padded, large)


def _equal(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or a.shape != b.shape:
        return False
    # a mean over the batch is added up in another order: rounding
    far = (a - b).abs() > _ROUNDING * a.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return not bool((far | (a.isnan() != b.isnan()) | ((a != b) & (a.isinf() | b.isinf()))).any())


def _shape(part: Any) -> tuple[int, ...] | None:
    if isinstance(part, Tensor) and part.is_nested:
        return None
    return tuple(part.shape) if isinstance(part, Tensor | np.ndarray) else None


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return torch.as_tensor(value) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, bool | int | float) or _is_numbers(value):
        try:
            return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        except (ValueError, OverflowError, RuntimeError):
            return value
    return value


def _is_numbers(part: Any) -> bool:
    return isinstance(part, list | tuple) and bool(part) and all(type(each) in (int, float, bool) for each in part)


def _is_list(part: Any) -> bool:
    return isinstance(part, list | tuple) and not hasattr(part, "_fields")


def _are_fields(part: Sequence[Any], rows: int, lengths: Sequence[Sequence[int]]) -> bool:
    """Whether a list as long as the batch holds parts of the batch, not its rows."""
    return all(bool(layout(each, rows, lengths)) for each in part)


def _space(part: Any) -> dict[str, Any]:
    """What an object holds; nothing of those that are no data."""
    if isinstance(part, type | nn.Module | Tensor | np.ndarray) or callable(part):
        return {}
    space = getattr(part, "__dict__", None)
    slots = {name: getattr(part, name) for name in getattr(type(part), "__slots__", ()) if hasattr(part, name)}
    return {**slots, **(space if isinstance(space, dict) else {})}


def _parts(part: Any) -> list[tuple[tuple[str, Any], Any]]:
    if isinstance(part, PackedSequence):
        padded, lengths = pad_packed_sequence(part, batch_first=True)
        return [(("packed", 0), padded), (("packed", 1), lengths)]
    if isinstance(part, Tensor) and part.is_nested:
        return [(("nested", 0), list(part.unbind()))]
    if isinstance(part, Mapping):
        return [(("key", key), value) for key, value in part.items()]
    if isinstance(part, list | tuple):
        return [(("place", k), value) for k, value in enumerate(part)]
    return [(("attribute", name), value) for name, value in _space(part).items()]
