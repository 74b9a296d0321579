"""Edge probabilities held against how often the edge is there: the exact posterior under tiers, and the flow's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.effects.tiers import KINDS, PATHS, TIERS, sampled
from ine_callback.effects import EffectData, paths
from ine_callback.effects.flow import edge_chances
from ine_callback.effects.posterior import posterior

Floats = NDArray[np.float64]
ORDER = [["C", "D"], ["A"], ["M", "N"], ["Y"]]
CURVES: dict[str, Callable[[Any], Any]] = {
    "line": lambda x: x,
    "absolute value": lambda x: np.abs(x) - np.sqrt(2 / np.pi),
}
BINS = np.linspace(0, 1, 11)


def weak(curve: str, rows: int, rng: Any) -> tuple[EffectData, set[tuple[str, str]]]:
    """Each allowed edge is there with probability ½ and coefficient ±U(.05, .4); the treatment's causes are lines."""
    tier = {name: k for k, names in enumerate(ORDER) for name in names}
    names, f = [*tier], CURVES[curve]
    columns: dict[str, Floats] = {}
    there = set()
    for v in names:
        total = np.zeros(rows)
        for u in names:
            if tier[u] < tier[v] and rng.random() < 0.5:
                there.add((u, v))
                shape = columns[u] if v == "A" or u == "A" else f(columns[u])
                total = total + rng.choice([-1, 1]) * rng.uniform(0.05, 0.4) * shape
        treated = rng.random(rows) < 1 / (1 + np.exp(-2 * total))
        columns[v] = 1.0 * treated if v == "A" else total + rng.normal(size=rows)
    return EffectData(columns, "A", "Y", tiers=ORDER), there


def calibration(curve: str, rows: int, runs: int) -> dict[str, dict[str, float]]:
    """By posterior: expected calibration error over ten bins, Brier score, and frequencies at its ends."""
    said: dict[str, list[float]] = {"exact": [], "flow": []}
    true: list[bool] = []
    for seed in track(range(runs), description=f"calibration, {curve}"):
        data, there = weak(curve, rows, np.random.default_rng([7, seed]))
        exact, flow = posterior(data), edge_chances(data, seed)
        for edge, chances in flow.items():
            true.append(edge in there)
            said["flow"].append(float(chances.mean()))
            said["exact"].append(exact.edge(*edge))
    return {name: _measures(np.array(each), np.array(true)) for name, each in said.items()}


def _measures(said: Floats, true: NDArray[np.bool_]) -> dict[str, float]:
    which = np.digitize(said, BINS[1:-1])
    gaps = [abs(said[which == k].mean() - true[which == k].mean()) * (which == k).mean() for k in set(which)]
    high, low = said > 0.9, said < 0.1
    return {
        "edges": len(true),
        "calibration error": float(sum(gaps)),
        "Brier score": float(((said - true) ** 2).mean()),
        "there, of those above .9": float(true[high].mean()) if high.any() else np.nan,
        "there, of those below .1": float(true[low].mean()) if low.any() else np.nan,
    }


def flow_paths(rows: int, runs: int) -> dict[str, float]:
    """F1 of paths of stability .15 or more by a flow, on the data of ``tiers``."""
    found = {}
    for kind in KINDS:
        right = count = 0
        for seed in track(range(runs), description=f"paths by a flow, {kind}"):
            columns = sampled(kind, rows, np.random.default_rng(seed))
            columns.pop("through")
            each = paths(
                EffectData(columns, "A", "Y", tiers=TIERS), posterior="flow", nuisances="linear", seed=seed
            ).found
            right, count = right + sum(one.nodes in PATHS for one in each), count + len(each)
        found[kind] = 2 * right / (count + len(PATHS) * runs)
    return found
