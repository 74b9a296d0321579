"""Attributions to compare part by part, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def parts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that a value holds, with the names on the way; arrays as bytes with their shape and type."""
    if isinstance(value, np.ndarray):
        if value.dtype == np.float64:
            value = np.where(np.isnan(value), np.nan, value)  # there are many, in bits
        yield name, (value.shape, value.dtype, value.tobytes())
    elif is_dataclass(value):
        for each in fields(value):
            yield from parts(getattr(value, each.name), f"{name}.{each.name}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from parts(each, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield name, len(value)
        for index, each in enumerate(value):
            yield from parts(each, f"{name}[{index}]")
    else:
        yield name, repr(value)


def assert_same(one: Any, other: Any) -> None:
    """Both hold the same, to the last bit."""
    for here, there in zip(parts(one), parts(other), strict=True):
        assert here == there, here[0]
