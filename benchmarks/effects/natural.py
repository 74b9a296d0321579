"""Coverage of all estimands in a linear model with one mediator, and the ATE beside doubleml's."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import track
from sklearn.linear_model import LinearRegression, LogisticRegression

from ine_callback.effects import ATE, NDE, NIE, WCDE, EffectData, estimate
from ine_callback.effects.graph import causal_graph

GRAPH = "C -> A; C -> M; C -> Y; A -> M -> Y; A -> Y"
TRUE = {"ATE": 0.02, "WCDE": 0.5, "NDE": 0.5, "NIE": -0.48}


def sampled(rows: int, seed: int) -> dict[str, Any]:
    """Direct effect .5, indirect .8 times -.6, confounded by C."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=rows)
    a = rng.random(rows) < 1 / (1 + np.exp(-0.7 * c))
    m = 0.8 * a + 0.4 * c + rng.normal(size=rows)
    return {"C": c, "A": a * 1.0, "M": m, "Y": 0.5 * a - 0.6 * m + 0.3 * c + rng.normal(size=rows)}


def coverage(rows: int, repetitions: int) -> dict[str, dict[str, float]]:
    """By estimand and nuisances: coverage of the 95 % interval, bias, deviation, mean standard error."""
    found = {}
    for models in ("linear", "spline"):
        for estimand in (ATE(), WCDE(), NDE(), NIE()):
            each = []
            for seed in track(range(repetitions), description=f"{estimand.name}, {models}"):
                one = estimate(EffectData(sampled(rows, seed), "A", "Y", GRAPH), estimand, models, refuse=False)
                each.append([one.estimate - TRUE[estimand.name], one.standard_error])
            error, se = np.array(each).T
            found[f"{estimand.name}, {models}"] = {
                "coverage": float((np.abs(error) < 1.96 * se).mean()),
                "bias": float(error.mean()),
                "deviation": float(error.std()),
                "mean standard error": float(se.mean()),
            }
    return found


def beside_doubleml(rows: int, repetitions: int) -> dict[str, float] | None:
    """The same estimate by doubleml's interactive model with the same scikit-learn models; None where not installed."""
    if find_spec("doubleml") is None:
        return None
    import doubleml

    differences, ratios, seconds = [], [], {"ours": 0.0, "doubleml": 0.0}
    learners = (LinearRegression(), LogisticRegression())
    for seed in track(range(repetitions), description="beside doubleml"):
        columns = sampled(rows, seed)
        start = time.process_time()
        ours = estimate(EffectData(columns, "A", "Y", GRAPH), ATE(), learners)
        seconds["ours"] += time.process_time() - start
        start = time.process_time()
        data = doubleml.DoubleMLData(pd.DataFrame(columns), y_col="Y", d_cols="A", x_cols=["C"])
        theirs = doubleml.DoubleMLIRM(data, *learners, n_folds=5).fit()
        seconds["doubleml"] += time.process_time() - start
        differences.append((ours.estimate - theirs.coef[0]) / theirs.se[0])
        ratios.append(ours.standard_error / theirs.se[0])
    return {
        "largest difference in standard errors": float(np.abs(differences).max()),
        "standard errors, ratio": float(np.mean(ratios)),
        "seconds a fit, ours": seconds["ours"] / repetitions,
        "seconds a fit, doubleml": seconds["doubleml"] / repetitions,
    }


def beside_dowhy(rows: int, repetitions: int) -> dict[str, float] | None:
    """The same by dowhy: its efficient adjustment set, and its linear estimate; None where not installed.

    dowhy has no WCDE, and its mediation is of linear regressions without an influence function.
    """
    if find_spec("dowhy") is None:
        return None
    from dowhy import CausalModel

    graph = causal_graph(GRAPH, "A", "Y").graph
    same, differences = [], []
    for seed in track(range(repetitions), description="beside dowhy"):
        columns = sampled(rows, seed)
        ours = estimate(EffectData(columns, "A", "Y", GRAPH), ATE(), "linear")
        model = CausalModel(pd.DataFrame(columns), treatment="A", outcome="Y", graph=graph)
        found = model.identify_effect(method_name="efficient-adjustment")
        same.append(tuple(sorted(found.get_backdoor_variables())) == ours.adjustment[0])
        theirs = model.estimate_effect(found, method_name="backdoor.linear_regression")
        differences.append((ours.estimate - float(theirs.value)) / ours.standard_error)
    return {
        "same adjustment set": float(np.mean(same)),
        "largest difference in standard errors": float(np.abs(differences).max()),
    }
