"""Paths under tiers: two covariates, a treatment, four mediators of which two are real, an outcome."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.progress import track

from ine_callback.effects import EffectData, paths

TIERS = [["C", "D"], ["A"], ["M", "N", "O", "P"], ["Y"]]
PATHS = {("A", "M", "Y"), ("A", "N", "Y"), ("A", "Y")}
KINDS = ("linear", "sin and tanh")


def sampled(kind: str, rows: int, rng: Any, treated: bool | None = None) -> dict[str, Any]:
    """Columns; with ``treated``, the mediators and Y's part of them are as if all rows had that treatment."""
    f, g = (np.sin, np.tanh) if kind != "linear" else (lambda x: x, lambda x: x)
    c, d, m, n, o, p, y = rng.normal(size=(7, rows))
    a = 1.0 * (rng.random(rows) < 1 / (1 + np.exp(-0.7 * c + 0.4 * d)))
    under = a if treated is None else np.full(rows, float(treated))
    m, n = m + 0.8 * under + 0.4 * f(c), n - 0.7 * under + 0.3 * f(d)
    o, p = o + 0.5 * f(c), p + 0.5 * f(d)
    through = {"M": -0.6 * g(m), "N": 0.7 * g(n)}
    outcome = y + 0.5 * a + through["M"] + through["N"] + 0.4 * f(c)
    return {"C": c, "D": d, "A": a, "M": m, "N": n, "O": o, "P": p, "Y": outcome, "through": through}


def truth(kind: str) -> dict[tuple[str, ...], float]:
    """Effects along the paths, from two million rows with the same noise under both treatments."""
    on, off = (sampled(kind, 2_000_000, np.random.default_rng(1), treated) for treated in (True, False))
    found = {("A", v, "Y"): float((on["through"][v] - off["through"][v]).mean()) for v in ("M", "N")}
    return found | {("A", "Y"): 0.5}


def measured(kind: str, rows: int, repetitions: int) -> dict[str, float]:
    """F1 of the paths found, and bias and coverage of their effects."""
    true, hits, errors, covered = truth(kind), [0, 0], [], []
    for seed in track(range(repetitions), description=f"paths, {kind}"):
        columns = sampled(kind, rows, np.random.default_rng(seed))
        columns.pop("through")
        data = EffectData(columns, "A", "Y", tiers=TIERS)
        found = paths(data, nuisances="linear" if kind == "linear" else "spline").found
        hits = [hits[0] + sum(one.nodes in true for one in found), hits[1] + len(found)]
        for one in found:
            if len(one.nodes) == 3 and one.nodes in true:
                errors.append(one.effect - true[one.nodes])
                covered.append(abs(errors[-1]) < 1.96 * one.standard_error)
    return {
        "F1 of paths": 2 * hits[0] / (hits[1] + len(true) * repetitions),
        "bias of indirect effects": float(np.mean(errors)),
        "deviation": float(np.std(errors)),
        "coverage": float(np.mean(covered)),
    }
