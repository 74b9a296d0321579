"""Graphs by causal-learn: directions that independences tell, those that they leave open, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ine_callback.effects import ATE, EffectData, discovered_graph, estimate
from ine_callback.errors import InfluenceError

pytest.importorskip("causallearn", reason="causal-learn, of the extra effects, is not installed")


def columns() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2000))
    c = a + b + 0.5 * rng.normal(size=2000)
    return {"A": a, "B": b, "C": c, "D": c + 0.5 * rng.normal(size=2000)}


def test_a_collider_tells_all_directions() -> None:
    assert discovered_graph(columns()) == "A -> C; B -> C; C -> D"


def test_a_chain_leaves_them_open_until_somebody_says() -> None:
    chain = {name: column for name, column in columns().items() if name != "B"}
    with pytest.raises(InfluenceError, match="leave open which causes which: A and C, C and D; say it by tiers="):
        discovered_graph(chain)
    for known in ({"tiers": [["A"], ["C"], ["D"]]}, {"decided": [("A", "C")]}):
        assert discovered_graph(chain, **known) == "A -> C; C -> D"


def test_a_found_graph_is_one_to_estimate_by() -> None:
    rng = np.random.default_rng(1)
    c, d = rng.normal(size=(2, 3000))
    a = rng.random(3000) < 1 / (1 + np.exp(-c))
    made = {"C": c, "D": d, "A": 1.0 * a, "Y": a + c + d + rng.normal(size=3000)}
    graph = discovered_graph(made, tiers=[["C", "D"], ["A"], ["Y"]])
    assert graph == "C -> A; C -> Y; D -> Y; A -> Y"
    found = estimate(EffectData(made, "A", "Y", graph), ATE(), "linear")
    assert abs(found.estimate - 1) < 4 * found.standard_error


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"B": np.zeros((2000, 2))}, {}, "'B' has several numbers a row"),
        ({"B": np.ones(2000)}, {}, "at least three columns of finite numbers that vary"),
        ({}, {"tiers": [["A"], ["Z"]]}, "'Z' is no column"),
        ({}, {"decided": [("A", "Z")]}, "'Z' is no column"),
    ],
)
def test_columns_that_cannot_be_tested_are_refused(
    changed: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InfluenceError, match=f"^discovered_graph: .*{message}"):
        discovered_graph(columns() | changed, **options)
