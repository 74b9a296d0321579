"""Estimates from rows: closed forms, coverage, cross-fitting, the choice of columns, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression

from ine_callback.effects import ATE, NDE, NIE, WCDE, EffectData, estimate
from ine_callback.effects.estimands import Estimand, paired_means, shifted
from ine_callback.effects.estimation import choose, cross_fit, deal
from ine_callback.effects.nuisances import Basis, Logistic, Ridge
from ine_callback.effects.parsing import nuisances
from ine_callback.errors import InfluenceError
from ine_callback.utilities.tracking import untracked

GRAPH = "C -> A; C -> M; C -> Y; A -> M -> Y; A -> Y"
TRUE = {"ATE": 0.02, "WCDE": 0.5, "NDE": 0.5, "NIE": -0.48}


def table(rows: int, seed: int) -> dict[str, Any]:
    """Direct effect .5, and .8 × −.6 through M; Y also takes M by treatment where asked."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=rows)
    a = rng.random(rows) < 1 / (1 + np.exp(-0.7 * c))
    m = 0.8 * a + 0.4 * c + rng.normal(size=rows)
    return {"C": c, "A": a, "M": m, "Y": 0.5 * a - 0.6 * m + 0.3 * c + rng.normal(size=rows)}


def data(rows: int = 600, seed: int = 0, **changed: Any) -> EffectData:
    return EffectData(table(rows, seed) | changed, "A", "Y", GRAPH)


@pytest.mark.parametrize(
    "estimand",
    [ATE(), NIE(), *(pytest.param(each, marks=pytest.mark.long) for each in (WCDE(), NDE()))],
    ids=lambda each: each.name,
)
def test_intervals_cover_the_truth(estimand: Estimand) -> None:
    covered, standardised = 0, []
    for seed in range(120):
        found = estimate(data(800, 1000 + seed), estimand, "linear", refuse=False)
        low, high = found.interval()
        covered += low <= TRUE[estimand.name] <= high
        standardised.append((found.estimate - TRUE[estimand.name]) / found.standard_error)
    assert 0.90 <= covered / 120 <= 0.99  # .95 ± 2.5 standard errors
    assert abs(np.mean(standardised)) < 0.25 and 0.8 < np.std(standardised) < 1.2


def test_an_experiment_s_effect_is_the_difference_of_means() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 1000)
    y = 2.0 * a + rng.normal(size=1000)
    found = estimate(EffectData({"A": a, "Y": y}, "A", "Y", "A -> Y"), ATE())
    one, other = y[a == 1], y[a == 0]
    assert abs(found.estimate - (one.mean() - other.mean())) < 0.01
    se = np.sqrt(one.var() / len(one) + other.var() / len(other))
    assert abs(found.standard_error / se - 1) < 0.01
    expected = np.where(a == 1, (y - one.mean()) / a.mean(), -(y - other.mean()) / (1 - a.mean()))
    assert np.corrcoef(found.influence, expected)[0, 1] > 0.999


def test_influence_sums_to_nothing_and_predicts_the_estimate_without_a_row() -> None:
    found = estimate(data(), NDE(), "linear")
    assert abs(found.influence.mean()) < 1e-12
    assert found.standard_error == pytest.approx(found.influence.std() / np.sqrt(600))
    assert set(found.top(3)) == set(np.argsort(found.influence)[-3:])
    assert (found.removal == -found.influence / 599).all()


def test_leaving_a_row_out_moves_the_estimate_as_its_influence_says() -> None:
    """By estimating anew without it, with the others in the same folds."""
    made, models = data(600), nuisances("linear")
    fold = deal(made.treated, 5, np.random.default_rng(0))
    whole = cross_fit(made, ATE(), [frozenset({"C"})] * 5, models, fold, 0)
    rows = np.random.default_rng(1).choice(600, 60, replace=False)
    moved = []
    for row in rows:
        without = fold.copy()
        without[row] = -1
        moved.append(cross_fit(made, ATE(), [frozenset({"C"})] * 5, models, without, 0).estimate - whole.estimate)
    predicted = -whole.influence[rows] / 599
    assert np.corrcoef(predicted, moved)[0, 1] > 0.97
    assert abs(np.polyfit(predicted, moved, 1)[0] - 1) < 0.1


def test_a_treatment_that_acts_by_a_curve_needs_splines() -> None:
    rng = np.random.default_rng(0)
    c = rng.uniform(-2, 2, 4000)
    a = rng.random(4000) < 1 / (1 + np.exp(-2 * np.sin(2 * c)))
    y = a + 2 * np.sin(2 * c) + 0.3 * rng.normal(size=4000)
    made = EffectData({"C": c, "A": a, "Y": y}, "A", "Y", "C -> A -> Y; C -> Y")
    linear, spline = estimate(made, ATE(), "linear"), estimate(made, ATE(), "spline")
    assert abs(spline.estimate - 1) < 3 * spline.standard_error < 0.1
    assert abs(linear.estimate - 1) > 0.3
    curve = (HistGradientBoostingRegressor(max_iter=50), HistGradientBoostingClassifier(max_iter=50))
    trees = estimate(made, ATE(), curve)
    assert abs(trees.estimate - 1) < 4 * trees.standard_error
    assert trees.nuisances == "HistGradientBoostingRegressor, HistGradientBoostingClassifier"


def test_scikit_learn_s_linear_models_give_what_ours_give() -> None:
    ours = estimate(data(2000), ATE(), "linear")
    theirs = estimate(data(2000), ATE(), (LinearRegression(), LogisticRegression()))
    assert abs(ours.estimate - theirs.estimate) < 1e-3 and np.corrcoef(ours.influence, theirs.influence)[0, 1] > 0.999


def test_the_valid_set_of_lower_variance_is_chosen_where_a_node_is_hidden() -> None:
    """H, the parent of Y, is hidden; of its two causes P says nearly all about it, R nearly nothing."""
    chosen, gained = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        c, p, r = rng.normal(size=(3, 1500))
        a = rng.random(1500) < 1 / (1 + np.exp(-c))
        h = c + 2 * p + 0.1 * r
        y = a + h + 0.5 * rng.normal(size=1500)
        made = EffectData(
            {"C": c, "P": p, "R": r, "A": a, "Y": y}, "A", "Y", "C -> A -> Y; C -> H -> Y; P -> H; R -> H", hidden=["H"]
        )
        found = estimate(made, ATE(), "linear")
        chosen += found.adjustment
        gained.append(found.standard_error / estimate(made, ATE(adjust=["C"]), "linear").standard_error)
        assert abs(found.estimate - 1) < 4 * found.standard_error and "lowest estimated variance" in found.why
    assert all({"C", "P"} <= set(each) for each in chosen) and max(gained) < 0.6


def test_the_density_ratio_needs_products_of_columns() -> None:
    """Of correlated normal columns; the logarithm of p(z₁) p(z₂) / p(z₁, z₂) is quadratic."""
    rng = np.random.default_rng(0)
    rho = 0.7
    z = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 5000)
    mixed = np.c_[z[:, 0], rng.permutation(z[:, 1])]
    true = 0.5 * np.log(1 - rho**2) + (z[:, 0] ** 2 - 2 * rho * z[:, 0] * z[:, 1] + z[:, 1] ** 2) / (2 * (1 - rho**2))
    true -= (z**2).sum(1) / 2
    every = np.ones((1, 5000), dtype=bool)
    found = np.log(nuisances("linear").odds(mixed, z, every, every)[0](z))
    assert np.corrcoef(found, true)[0, 1] > 0.99
    without = Logistic(Basis(splines=False, products=False)).fit(np.r_[z, mixed], np.r_[np.zeros(5000), np.ones(5000)])
    assert without.predict_proba(z)[:, 1].std() < 0.02  # constant: both have the same margins


def test_ridge_is_least_squares_where_there_is_no_noise_and_less_where_there_is_nothing_else() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    plain = Basis(splines=False, products=False)
    assert np.abs(Ridge(plain).fit(x, x @ [1, 2, 3]).predict(x) - x @ [1, 2, 3]).max() < 1e-3
    noise = rng.normal(size=200)
    assert Ridge(plain).fit(x, noise).predict(x).std() < np.linalg.lstsq(x, noise, rcond=None)[0].std()


@given(st.integers(2, 100), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_partners_are_balanced(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders = np.array(shifted(np.arange(rows), 64, rng))
    assert all(len(set(order)) == rows for order in orders)
    assert all(len(set(place)) == len(orders) for place in orders.T)
    z1, z2 = rng.normal(size=(2, rows, 1))
    h1, h2 = paired_means(lambda z: z[:, 0] * np.exp(z[:, 1]), z1, z2, rng)
    assert h1.mean() == pytest.approx(h2.mean())
    if rows <= 64:
        table = z1 * np.exp(z2.T)
        assert np.allclose(h1, table.mean(1)) and np.allclose(h2, table.mean(0))


def test_data_frames_and_categories_are_columns() -> None:
    frame = pd.DataFrame(table(600, 0))
    assert estimate(EffectData(frame, "A", "Y", GRAPH), ATE()).estimate == estimate(data(), ATE()).estimate
    kinds = np.array(["x", "y", "z"])[np.random.default_rng(0).integers(0, 3, 600)]
    assert data(C=kinds).matrix(["C"]).shape == (600, 2)
    digits = np.random.default_rng(0).integers(0, 5, 600).astype(str)  # text, so no numbers
    assert (data(C=digits).matrix(["C"]) == (digits[:, None] == list("1234"))).all()
    assert data(C=np.array([1, 2.5] * 300, dtype=object)).matrix(["C"]).shape == (600, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": np.arange(600) % 3}, "treatment 'A' must be 0 or 1 .* 0, 1, 2; make it a comparison"),
        ({"A": np.ones(600)}, "must be 0 or 1"),
        ({"C": np.r_[np.nan, np.zeros(599)]}, "'C' has no finite number in row 0;"),
        ({"C": np.zeros(5)}, "unequal lengths"),
        ({"C": np.zeros((600, 2, 2))}, "'C' is of type float64 and shape"),
        ({"C": np.array([None, "a"] * 300)}, "'C' has text and missing values"),
        ({"Y": np.zeros((600, 2))}, "outcome 'Y' has 2 numbers a row"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=f"^EffectData: .*{message}"):
        data(**changed)


def test_nodes_without_a_column_are_refused_unless_hidden() -> None:
    with pytest.raises(InfluenceError, match="the graph has 'H', and the columns are"):
        EffectData(table(600, 0), "A", "Y", f"{GRAPH}; H -> Y")
    assert "H" not in EffectData(table(600, 0), "A", "Y", f"{GRAPH}; H -> Y", hidden=["H"]).graph.observed
    with pytest.raises(InfluenceError, match="'Y' is treatment or outcome and cannot be hidden"):
        EffectData(table(600, 0), "A", "Y", GRAPH, hidden=["Y"])


@pytest.mark.parametrize(
    ("estimand", "message"),
    [
        (ATE(adjust=["M"]), r"ATE: \{M\} is not valid, \{C\} is: \{M\} lies on a causal path"),
        (ATE(adjust=["A"]), "ATE: 'A' cannot be adjusted for"),
        (WCDE(adjust=["C"]), r"WCDE: \{C\} is not valid, \{C, M\} is: condition 3"),
        (NDE(adjust=[]), "NDE: .* have a common cause"),
        (NIE(mediators=["C"]), "NIE: 'C' does not lie on a directed path"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_sets_that_are_not_valid_are_refused_with_the_reason(estimand: Estimand, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        estimate(data(), estimand)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(InfluenceError, match="200 rows in 5 folds are fewer than 50 a fold"):
        estimate(data(200), ATE())
    with pytest.raises(InfluenceError, match="10 rows with the rarer treatment"):
        estimate(data(A=np.arange(600) < 10), ATE())
    with pytest.raises(InfluenceError, match="nuisances='forest'; choose 'spline'"):
        estimate(data(), ATE(), "forest")
    with pytest.raises(
        InfluenceError, match=r"no set of columns is valid\. Of \{\}: \{\} leaves a back-door path open"
    ):
        estimate(EffectData(table(600, 0), "A", "Y", GRAPH, hidden=["C"]), ATE())
    alone = {name: column for name, column in table(600, 0).items() if name != "M"}
    with pytest.raises(InfluenceError, match="WCDE: no mediator between 'A' and 'Y'"):
        estimate(EffectData(alone, "A", "Y", "C -> A -> Y; C -> Y"), WCDE())


def test_rows_that_hardly_occur_with_both_treatments_are_refused() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(1000) < 0.5
    m = 12.0 * a + rng.normal(size=1000)
    made = EffectData({"A": a, "M": m, "Y": m + rng.normal(size=1000)}, "A", "Y", "A -> M -> Y; A -> Y")
    with pytest.raises(
        InfluenceError, match="NDE: positivity fails: for 'A = 1, mediators as under 0' the weighted rows differ"
    ):
        estimate(made, NDE(), "linear")


def test_a_table_says_what_the_estimate_rests_on() -> None:
    text = str(estimate(data(), WCDE(adjust=["C", "M"]), "linear"))
    for part in ("WCDE", "A on Y", "holds if", "the graph is right", "adjusted for {C, M}: you named it", "5 folds"):
        assert part in text
    assert str(estimate(data(), ATE())) == str(estimate(data(), ATE()))  # seeded


def test_the_package_alone_imports_none_of_it() -> None:
    code = "import ine_callback, ine_callback.report, sys; print([m for m in sys.modules if '_callback.effects' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = "import ine_callback.effects, sys; print([m for m in ('torch', 'lightning', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_each_half_of_the_rows_chooses_for_the_other() -> None:
    """Of the first half of the folds P tells the outcome and R the treatment, of the second the other way round."""
    rng = np.random.default_rng(0)
    c, p, r = rng.normal(size=(3, 2000))
    fold = rng.integers(0, 4, 2000)
    first = fold % 2 == 0
    a = rng.random(2000) < 1 / (1 + np.exp(-c - 1.5 * np.where(first, r, p)))
    y = a + c + 2 * np.where(first, p, r) + 0.5 * rng.normal(size=2000)
    graph = "C -> A -> Y; C -> H -> Y; P -> H; R -> H"
    made = EffectData({"C": c, "P": p, "R": r, "A": a, "Y": y}, "A", "Y", graph, hidden=["H"])
    found = choose(made, ATE(), nuisances("linear"), fold, 0, untracked)
    assert found.sets == (frozenset("CR"), frozenset("CP")) * 2
