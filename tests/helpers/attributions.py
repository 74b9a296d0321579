"""An attribution with everything, and attributions compared part by part, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ine_callback.scores import Attribution, Check, LayerScores, QueryInfo, TokenScores

VAL, OTHER = QueryInfo("val", "loss", "Does it help?"), QueryInfo("other", "margin", "And this?")


def whole(method: str = "my method", **changed: Any) -> Attribution:
    """Three rows on two queries, with everything."""
    g = np.random.default_rng(0)
    scores = g.standard_normal((3, 2))
    held: dict[str, Any] = {
        "se": np.abs(scores), "p": scores**2 % 1, "q": scores**4 % 1,
        "columns": {"": scores, "se": scores + 1, "column é\n\0": scores + 2, "column é\n\0_se": scores + 3},
        "ranked_by": "column é\n\0", "doubtful": scores > 0,
        "layers": LayerScores(("net.0", "", "net.0"), g.standard_normal((3, 3, 2))),
        "tokens": TokenScores(np.array([0, 2, 2, 5]), g.standard_normal((5, 2)), None, g.random((5, 2))),
        "checks": (Check("finite", np.nan, "below 1", False, "wait"), Check("large", -np.inf, "above", True, "go")),
        "settings": {"a": {"b": [1, None, "x"]}}, "arrays": {"trace": g.random((2, 0, 3)), "scalar": np.array(3.0)},
        "notes": ("one", "two"), "title": "My method", "headline": "fast", "legend": "read", "at": 3,
    }  # fmt: skip
    scores[1, 0], scores[2, 1] = np.nan, -np.inf
    return Attribution(method, np.array([7, 2, 9]), (VAL, OTHER), scores, **held | changed)


def of_tokens(rows: int = 60, length: int = 5) -> Attribution:
    """Scores of each row's tokens on one query."""
    scores = np.random.default_rng(0).standard_normal((rows * length, 1))
    tokens, sums = TokenScores(np.arange(rows + 1) * length, scores), scores.reshape(rows, length, 1).sum(1)
    return Attribution("token influence", np.arange(rows), (QueryInfo("positive", "custom", "?"),), sums, tokens=tokens)


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
