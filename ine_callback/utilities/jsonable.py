"""Values and texts as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def jsonable(value: Any, where: str) -> Any:
    """A deep copy of ``value`` in plain JSON types: NaN becomes None, infinities strings, tuples and arrays lists.

    Raises:
        ValueError: When a value has no JSON form; ``where`` names it.

    Example:
        >>> jsonable({"lr": np.float32(0.5), "betas": (0.9, float("inf"))}, "config")
        {'lr': 0.5, 'betas': [0.9, 'inf']}
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return unicode(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {unicode(str(key)): jsonable(item, f"{where}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold; pass str(value) or leave it out")


def unicode(text: str) -> str:
    r"""File names can hold what is no Unicode, which no file of text takes: it is spelled out.

    Example:
        >>> unicode("a\udcff")
        'a\\udcff'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
