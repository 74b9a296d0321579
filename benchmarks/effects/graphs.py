"""The protocol of arXiv 2506.09871: which adjustment set of the WCDE has the lowest variance, in its two graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from ine_callback.effects import WCDE, EffectData
from ine_callback.effects.adjustment import names, valid_sets, wcde_faults
from ine_callback.effects.estimation import LARGEST_IMBALANCE, SMALLEST_SAMPLE, cross_fit, deal
from ine_callback.effects.graph import causal_graph
from ine_callback.effects.parsing import nuisances

GRAPHS = {
    "back door": "B2 -> A; B2 -> G1; B2 -> G2; A -> G1 -> Y; G2 -> Y; A -> Y",
    "mediator": "A -> B1 -> G1 -> Y; G2 -> A; G2 -> Y; A -> Y",
}
ORDER = {"back door": ["B2", "A", "G1", "G2", "Y"], "mediator": ["G2", "A", "B1", "G1", "Y"]}
FOLDS = 5
FUNCTIONS: dict[str, Callable[[Any], Any]] = {"sum": lambda x: x, "sin": np.sin}
Floats = NDArray[np.float64]


def sampled(
    name: str, function: str, coefficients: dict[tuple[str, str], float], noise: float, rows: int, rng: Any
) -> EffectData:
    """Rows of a graph: each node is the sum of its parents' functions with noise, the treatment a coin by that sum."""
    graph, f = causal_graph(GRAPHS[name], "A", "Y"), FUNCTIONS[function]
    columns: dict[str, Floats] = {}
    for node in ORDER[name]:
        total = sum((coefficients[u, node] * f(columns[u]) for u in graph.parents(node)), np.zeros(rows))
        chance = 1 / (1 + np.exp(-total))
        columns[node] = 1.0 * (rng.random(rows) < chance) if node == "A" else total + noise * rng.normal(size=rows)
    return EffectData(columns, "A", "Y", GRAPHS[name])


def variances(
    name: str, function: str, models: str, noise: float, rows: int, sets: int, repetitions: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """By adjustment set: variance, squared error and coverage over repetitions, averaged over sets of coefficients."""
    graph, fitted, rng = causal_graph(GRAPHS[name], "A", "Y"), nuisances(models), np.random.default_rng(seed)
    candidates = list(valid_sets(graph, wcde_faults))
    found: dict[str, list[dict[str, float]]] = {names(each): [] for each in candidates}
    for _ in track(range(sets), description=f"{name}, {function}, {rows} rows"):
        edges = sorted(graph.graph.edges)
        coefficients = {edge: float(rng.choice([-1, 1]) * rng.uniform(0.5, 1.5)) for edge in edges}
        truth = coefficients["A", "Y"] * (FUNCTIONS[function](1.0) - FUNCTIONS[function](0.0))
        each: dict[str, list[list[float]]] = {names(one): [] for one in candidates}
        for repetition in range(repetitions):
            data = sampled(name, function, coefficients, noise, rows, rng)
            fold = deal(data.treated, FOLDS, rng)
            for one in candidates:
                fit = cross_fit(data, WCDE(), [one] * FOLDS, fitted, fold, repetition)
                se, checks = fit.influence.std() / np.sqrt(rows), fit.positivity
                imbalance = max(checks.imbalance.values())
                each[names(one)].append([fit.estimate - truth, se, checks.smallest, imbalance])
        for key, values in each.items():
            error, se, size, imbalance = np.array(values).T
            covered, kept = np.abs(error) < 1.96 * se, (size >= SMALLEST_SAMPLE) & (imbalance <= LARGEST_IMBALANCE)
            found[key].append(
                {
                    "variance": float(error.var()),
                    "estimated variance": float((se**2).mean()),
                    "squared error": float((error**2).mean()),
                    "coverage": float(covered.mean()),
                    "coverage of those not refused": float(covered[kept].mean()) if kept.any() else np.nan,
                    "effective size": float(np.median(size)),
                    "imbalance": float(np.median(imbalance)),
                    "refused": float(1 - kept.mean()),
                }
            )
    return {key: {what: _mean([one[what] for one in all_]) for what in all_[0]} for key, all_ in found.items()}


def _mean(values: list[float]) -> float | None:
    """Of those that are there; None of none."""
    there = [value for value in values if value == value]
    return float(np.mean(there)) if there else None
