"""Networks as nuisances beside lines and splines: coverage where lines are wrong, and seconds a fit."""

from __future__ import annotations

import time

import numpy as np
from rich.progress import track

from ine_callback.effects import ATE, EffectData, estimate


def curved(rows: int, seed: int) -> EffectData:
    """Effect 1; treatment and outcome follow a curve of two columns, and their product."""
    rng = np.random.default_rng([11, seed])
    c, d = rng.uniform(-2, 2, (2, rows))
    a = rng.random(rows) < 1 / (1 + np.exp(-np.sin(2 * c) - 0.5 * c * d))
    y = a + np.sin(2 * c) + 0.5 * c * d + 0.5 * rng.normal(size=rows)
    return EffectData({"C": c, "D": d, "A": a, "Y": y}, "A", "Y", "C -> A -> Y; C -> Y; D -> A; D -> Y")


def measured(rows: int, runs: int) -> dict[str, dict[str, float]]:
    """By nuisances: bias, coverage of the 95 % interval, mean standard error, seconds a fit."""
    found = {}
    for models in ("linear", "spline", "network"):
        each, start = [], time.process_time()
        for seed in track(range(runs), description=f"ATE, {models}"):
            one = estimate(curved(rows, seed), ATE(), models, refuse=False)
            each.append([one.estimate - 1, one.standard_error])
        error, se = np.array(each).T
        found[models] = {
            "bias": float(error.mean()),
            "coverage": float((np.abs(error) < 1.96 * se).mean()),
            "deviation": float(error.std()),
            "mean standard error": float(se.mean()),
            "seconds a fit": (time.process_time() - start) / runs,
        }
    return found
