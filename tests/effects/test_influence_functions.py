"""Influence functions on laws that are tables: mean, derivative, robustness, and the set of lowest variance."""

from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
import pytest

from ine_callback.effects.adjustment import ate_faults, optimal_for_ate, optimal_for_wcde, valid_sets, wcde_faults
from ine_callback.effects.graph import CausalGraph, causal_graph

from .laws import AUTHORS, Law, ate, cross, gateaux, random_law, true_ate, true_wcde, wcde

MEDIATION = "C -> A; C -> M; C -> Y; A -> M -> Y; A -> Y"


def law_of(text: str, seed: int = 1) -> Law:
    return random_law(causal_graph(text, "A", "Y"), np.random.default_rng(seed))


@pytest.mark.parametrize("name", AUTHORS)
def test_the_wcde_s_influence_is_the_derivative_in_a_row_s_weight(name: str) -> None:
    law = law_of(AUTHORS[name])
    for adjust in valid_sets(law.graph, wcde_faults):
        found = wcde(law, adjust)
        assert abs(found.value - true_wcde(law)) < 1e-12
        assert abs(law.p @ found.influence) < 1e-14
        assert np.abs(gateaux(law, lambda other: wcde(other, adjust).value) - found.influence).max() < 1e-8  # noqa: B023


def test_the_ate_s_and_the_cross_mean_s_influence_are_derivatives() -> None:
    law = law_of(MEDIATION)
    for functional in (lambda law: ate(law, {"C"}), lambda law: cross(law, True, False, {"M"}, {"C"})):
        found = functional(law)
        assert abs(law.p @ found.influence) < 1e-14
        assert np.abs(gateaux(law, lambda other: functional(other).value) - found.influence).max() < 1e-8  # noqa: B023


def test_natural_effects_add_up_to_the_whole_one() -> None:
    law = law_of(MEDIATION)
    one, mixed, other = (cross(law, a, b, {"M"}, {"C"}).value for a, b in ((1, 1), (1, 0), (0, 0)))
    assert abs((mixed - other) + (one - mixed) - true_ate(law)) < 1e-12
    c, m = law.states[:, law.at["C"]], law.states[:, law.at["M"]]
    by_hand = 0.0
    for value_c in (0, 1):
        for value_m in (0, 1):
            here = (c == value_c) & ~law.treated
            by_hand += (law.p[c == value_c].sum() * law.p[here & (m == value_m)].sum() / law.p[here].sum()) * law.table[
                1, value_c, value_m
            ]
    assert abs(mixed - by_hand) < 1e-12


def test_the_wcde_survives_one_wrong_nuisance_and_the_published_form_does_not() -> None:
    law = law_of(AUTHORS["back door"], seed=5)
    truth, adjust = true_wcde(law), {"G1", "G2"}
    wrong_mu = {"mu": lambda arm, mean: np.full_like(mean, 1.0 if arm else -0.5)}
    wrong_weight = {"wrong_weight": lambda arm, weight: 2.0 * (weight > 0)}
    assert abs(wcde(law, adjust, **wrong_mu).value - truth) < 1e-12
    assert abs(wcde(law, adjust, **wrong_weight).value - truth) < 1e-12
    assert abs(wcde(law, adjust, **wrong_mu, **wrong_weight).value - truth) > 0.1
    plug_in = 1.5  # of a constant μ, 1 and −.5
    residual = wcde(law, adjust, **wrong_mu).value - plug_in
    published = 0.5 * (residual + 2 * plug_in)
    assert abs(published - truth) == pytest.approx(abs(plug_in - truth) / 2)  # half of the error stays


def test_the_cross_mean_survives_any_one_wrong_nuisance() -> None:
    law = law_of(MEDIATION, seed=3)
    rng = np.random.default_rng(0)
    key = law.keys({"A", "C", "M"})
    share = rng.uniform(0.2, 0.8, 8)[law.keys({"C"})]
    density = rng.uniform(0.2, 0.8, 8)  # of M, given C, for both treatments
    m, c = law.states[:, law.at["M"]] == 1, law.keys({"C"})
    f = [np.where(m, density[c + 2 * arm], 1 - density[c + 2 * arm]) for arm in (0, 1)]
    mu = rng.normal(size=8)[law.keys({"C", "M"})]
    assert len(set(key.tolist())) == 8
    truth = cross(law, True, False, {"M"}, {"C"}).value

    def value(pi: bool, of_m: bool, of_y: bool) -> float:
        def wrong(one, other, ratio, mean):  # type: ignore[no-untyped-def]
            shares = (share, 1 - share) if pi else (one, other)
            return *shares, f[0] / f[1] if of_m else ratio, mu if of_y else mean

        if not of_m:
            return cross(law, True, False, {"M"}, {"C"}, wrong).value
        # g integrates μ over the wrong density too
        found = cross(law, True, False, {"M"}, {"C"}, wrong)
        _, other, _, mean = wrong(*exact(law), law.given(law.mean, {"M", "C"}, law.treated))
        right_g = law.given(mean, {"C"}, ~law.treated)
        table = np.zeros((2, 2))
        table[c, m.astype(int)] = mean
        wrong_g = (table[c] * np.stack([1 - density[c], density[c]], 1)).sum(1)
        return found.value + float(law.p @ ((1 - ~law.treated / other) * (wrong_g - right_g)))

    assert all(abs(value(*one) - truth) < 1e-12 for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert all(abs(value(*two) - truth) > 1e-3 for two in ((1, 1, 0), (1, 0, 1), (0, 1, 1)))


def exact(law: Law):  # type: ignore[no-untyped-def]
    share = law.given(law.treated.astype(float), {"C"})
    late = law.given(law.treated.astype(float), {"C", "M"})
    return share, 1 - share, (1 - late) * share / (late * (1 - share))


def random_graph(rng: np.random.Generator, direct: bool) -> CausalGraph:
    order = [*rng.permutation(["A", "V0", "V1", "V2", "V3"]).tolist(), "Y"]
    graph = nx.DiGraph()
    graph.add_nodes_from(order)
    graph.add_edges_from((u, v) for u, v in combinations(order, 2) if rng.random() < 0.5)
    if direct:
        graph.add_edge("A", "Y")
    return causal_graph(graph, "A", "Y")


def test_valid_sets_of_random_graphs_give_the_effect_and_the_optimal_ones_the_lowest_variance() -> None:
    rng = np.random.default_rng(1)
    looked_at = 0
    for repetition in range(160):
        graph = random_graph(rng, direct=repetition % 4 > 0)
        law = random_law(graph, rng)
        cases = [(ate_faults, ate, true_ate, optimal_for_ate)]
        if graph.mediators & graph.parents("Y"):
            cases.append((wcde_faults, wcde, true_wcde, optimal_for_wcde))
        for faults, functional, truth, optimal in cases:
            if "Y" not in graph.descendants("A"):
                continue
            found = {adjust: functional(law, adjust) for adjust in valid_sets(graph, faults)}
            true = truth(law)
            assert all(abs(each.value - true) < 1e-8 for each in found.values())
            variances = {adjust: each.variance(law) for adjust, each in found.items()}
            assert variances[optimal(graph)] <= min(variances.values()) + 1e-9
            looked_at += 1
    assert looked_at > 150


def test_the_authors_graphs_have_the_published_order_of_variances() -> None:
    for name, order in (("back door", ["G1 G2", "B2 G1 G2", "B2 G1"]), ("mediator", ["G1 G2", "B1 G1 G2", "B1 G2"])):
        for seed in range(5):
            law = law_of(AUTHORS[name], seed)
            sets = [set(each.split()) for each in order]
            assert sorted(map(sorted, valid_sets(law.graph, wcde_faults))) == sorted(map(sorted, sets))
            variances = [wcde(law, each).variance(law) for each in sets]
            assert variances == sorted(variances)
