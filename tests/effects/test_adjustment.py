"""Graphs as users write them, and what is said about adjustment sets."""

from __future__ import annotations

import re

import networkx as nx
import numpy as np
import pytest

from ine_callback.effects.adjustment import (
    ate_faults,
    for_mediation,
    mediation_faults,
    optimal_for_ate,
    valid_sets,
    wcde_faults,
)
from ine_callback.effects.graph import causal_graph
from ine_callback.errors import InfluenceError

from .laws import AUTHORS


def test_text_networkx_and_tiers_are_the_same_graph() -> None:
    text = causal_graph("C -> A -> Y\n# a remark\nC → Y, D", "A", "Y")
    drawn = nx.DiGraph([("C", "A"), ("A", "Y"), ("C", "Y")])
    drawn.add_node("D")
    assert nx.utils.graphs_equal(text.graph, causal_graph(drawn, "A", "Y").graph)
    tiers = causal_graph(None, "A", "Y", tiers=[["C", "D"], ["A"], ["Y"]])
    assert set(tiers.graph.edges) == {("C", "A"), ("D", "A"), ("C", "Y"), ("D", "Y"), ("A", "Y")}


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("A -> B -> C -> A; A -> Y", r"cycle A -> B -> C -> A"),
        ("A -> B", r"'Y' is no node"),
        ("Y -> B -> A", r"'Y' comes before the treatment 'A'"),
        ("A -> -> Y", r"lacks a name"),
        (7, r"graph is a int"),
        (None, r"either graph="),
    ],
)
def test_graphs_that_are_none_are_refused(graph: object, message: str) -> None:
    with pytest.raises(InfluenceError, match=f"^EffectData: .*{message}"):
        causal_graph(graph, "A", "Y")


def test_a_name_in_two_tiers_is_refused() -> None:
    with pytest.raises(InfluenceError, match="'C' is in two tiers"):
        causal_graph(None, "A", "Y", tiers=[["C"], ["A", "C"], ["Y"]])


@pytest.mark.parametrize(
    ("graph", "adjust", "conditions"),
    [
        (AUTHORS["back door"], "G1", {"1", "2"}),  # A <- B2 -> G2 -> Y and G1 <- B2 -> G2 -> Y
        (AUTHORS["back door"], "G2", {"1", "3", "4"}),  # A <- B2 -> G1 -> Y too
        (AUTHORS["back door"], "B2 G2", {"3", "4"}),
        (AUTHORS["back door"], "G1 G2", set()),
        (AUTHORS["mediator"], "B1", {"1"}),  # A <- G2 -> Y
        ("A -> M -> Y; A -> Y; C -> A; C -> Y", "M", {"1"}),
        ("A -> M -> Y; A -> Y; U -> M; U -> Y", "M", {"2"}),
        ("A -> M -> Y; A -> Y; Y -> D", "M D", {"1"}),  # follows from the outcome
        ("A -> M -> Y; A -> Y; M -> D", "M D", set()),  # follows from what is held
        ("A -> M -> Y; A -> N -> Y", "M", {"3"}),
        ("A -> M -> N -> Y; A -> Y; M -> Y", "M", set()),
        ("A -> M -> N -> Y; A -> Y; M -> Y; C -> N; C -> Y", "M C", {"4"}),  # p(N) is not that of the rows
    ],
)
def test_the_broken_condition_is_named(graph: str, adjust: str, conditions: set[str]) -> None:
    faults = wcde_faults(causal_graph(graph, "A", "Y"), frozenset(adjust.split()))
    assert {re.match(r"condition (\d): ", fault)[1] for fault in faults} == conditions, faults  # type: ignore[index]


def test_the_wcde_s_sets_hold_mediators_and_the_ate_s_none() -> None:
    graph = causal_graph(AUTHORS["back door"], "A", "Y")
    assert all("G1" in each for each in valid_sets(graph, wcde_faults))
    assert list(valid_sets(graph, ate_faults)) == [{"B2"}, {"B2", "G2"}]
    assert optimal_for_ate(graph) == {"B2", "G2"}


def test_hidden_nodes_are_in_no_valid_set() -> None:
    graph = causal_graph(AUTHORS["back door"], "A", "Y", hidden=["B2"])
    assert list(valid_sets(graph, wcde_faults)) == [{"G1", "G2"}]
    assert list(valid_sets(graph, ate_faults)) == []


def test_a_confounder_that_the_treatment_causes_is_refused_for_mediation() -> None:
    graph = causal_graph("A -> L; L -> M; L -> Y; A -> M -> Y; C -> A; C -> Y", "A", "Y")
    one, both = frozenset({"M"}), frozenset({"L", "M"})
    assert for_mediation(graph, one) == {"C"}
    assert mediation_faults(graph, one, frozenset({"C"})) == ["M and Y have a common cause that {A, C} does not block"]
    assert mediation_faults(graph, one, frozenset({"C", "L"})) == ["{L} is caused by the treatment A"]
    assert mediation_faults(graph, both, frozenset({"C"})) == []  # the two together
    assert mediation_faults(graph, both, frozenset()) == ["A and Y have a common cause that {} does not block"]


def test_a_node_before_the_mediator_that_acts_through_it_alone_is_fine() -> None:
    graph = causal_graph("A -> L -> M -> Y; A -> Y", "A", "Y")
    assert mediation_faults(graph, frozenset({"M"}), frozenset()) == []


def test_of_many_nodes_small_sets_alone_are_searched() -> None:
    many = "; ".join(f"C{i} -> A; C{i} -> B" for i in range(16))
    graph = causal_graph(f"{many}; A -> Y; B -> Y", "A", "Y")
    assert next(valid_sets(graph, ate_faults)) == {"B"}
    assert max(len(each) for each in valid_sets(graph, ate_faults)) == 3


def test_d_separation_of_sets_is_that_of_all_pairs() -> None:
    """What open_back_doors relies on, node by node."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        order = list("ABCDEF")
        graph = nx.DiGraph([(u, v) for i, u in enumerate(order) for v in order[i + 1 :] if rng.random() < 0.4])
        graph.add_nodes_from(order)
        whole = nx.is_d_separator(graph, {"A", "B"}, {"F"}, {"C"})
        assert whole == all(nx.is_d_separator(graph, {x}, {"F"}, {"C"}) for x in "AB")
