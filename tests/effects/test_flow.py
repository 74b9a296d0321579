"""The flow's density, what it lets through, its stacked copies, its tempered probabilities, and curves that it sees."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch

from ine_callback.effects import EffectData, FlowSEM, paths
from ine_callback.effects.flow import edge_chances, tempered
from ine_callback.effects.networks import Batches, fit
from ine_callback.effects.posterior import of_edges, posterior
from ine_callback.errors import InfluenceError

TIERS = [["C", "D"], ["A"], ["M"], ["Y"]]
ALLOWED = np.triu(np.ones((4, 4), dtype=bool), 1)


def curved(rows: int, seed: int) -> EffectData:
    """C acts by |C| and D by cos(2 D), which have no slope; A and M by lines."""
    rng = np.random.default_rng(seed)
    c, d = rng.normal(size=(2, rows))
    a = rng.random(rows) < 0.5
    m = 0.8 * a + 0.8 * np.abs(c) + 0.5 * rng.normal(size=rows)
    y = 0.6 * m - 0.5 * a + np.cos(2 * d) + 0.5 * rng.normal(size=rows)
    return EffectData({"C": c, "D": d, "A": a, "M": m, "Y": y}, "A", "Y", tiers=TIERS)


def test_the_density_is_that_of_independent_normals_given_the_causes() -> None:
    module = FlowSEM(ALLOWED, copies=2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    mean, log_sd = (part.detach() for part in module(x))
    for b, i in ((0, 0), (1, 3)):
        by_hand = sum(
            -0.5 * ((float(x[i, j]) - float(mean[b, i, j])) / math.exp(log_sd[b, i, j])) ** 2
            - float(log_sd[b, i, j])
            - 0.5 * math.log(2 * math.pi)
            for j in range(4)
        )
        assert abs(float(module.log_density(x)[b, i]) - by_hand) < 1e-12


def test_a_column_depends_on_allowed_ones_alone_and_no_steeper_than_its_strength() -> None:
    module = FlowSEM(ALLOWED, copies=1).double()
    for x in torch.randn(20, 4, dtype=torch.float64):
        slopes = torch.autograd.functional.jacobian(lambda x: module(x[None])[0][0, 0], x)  # [column, cause]
        assert (slopes.T[~torch.as_tensor(ALLOWED)] == 0).all()
        assert (slopes.T.abs() <= module.strengths[0] + 1e-12).all()


def test_one_fit_is_as_many_fits_as_there_are_copies() -> None:
    x, weights = torch.randn(60, 4), torch.randint(0, 3, (60, 3)).float()
    module = FlowSEM(ALLOWED, copies=3)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module.double(), Batches([x.double(), weights.double()], 16, 0), 3)
    for k in range(3):
        alone = FlowSEM(ALLOWED, copies=1)
        for name, p in alone.named_parameters():
            p.data = start[name][k : k + 1].clone()
        fit(alone.double(), Batches([x.double(), weights[:, k : k + 1].double()], 16, 0), 3)
        assert (alone.strengths[0] - module.strengths[k]).abs().max() < 1e-9


def test_tempered_probabilities_of_the_true_weights_find_its_paths() -> None:
    """Where σ(|W|), as published, does not: see test_paths.py."""
    weights = np.zeros((5, 5))
    for i, j, w in ((0, 1, 0.8), (1, 4, -0.6), (0, 2, 0.5), (2, 3, 0.7), (3, 4, 0.9), (0, 4, 0.5), (1, 3, 0.3)):
        weights[i, j] = w
    chance = tempered(np.abs(weights))
    np.fill_diagonal(chance, 0)
    rng = np.random.default_rng(0)
    drawn = [nx.from_numpy_array((rng.random((5, 5)) < chance) * 1, create_using=nx.DiGraph) for _ in range(2000)]
    acyclic = [graph for graph in drawn if nx.is_directed_acyclic_graph(graph)]
    assert len(acyclic) / 2000 > 0.6  # of σ(|W|) not half of them, see there
    assert np.mean([graph.has_edge(0, 1) and graph.has_edge(1, 4) for graph in acyclic]) > 0.99


def test_sets_of_parents_have_the_edges_probabilities() -> None:
    made = curved(100, 0)
    rng = np.random.default_rng(1)
    copies = {(u, v): rng.random(6) for u, v in nx.DiGraph(made.graph.graph).edges}
    found = of_edges(made, copies)
    assert all(abs(sum(sets.values()) - 1) < 1e-12 for sets in found.parents.values())
    assert all(abs(found.edge(*edge) - chance.mean()) < 1e-12 for edge, chance in copies.items())
    each = copies["A", "M"] * copies["M", "Y"]
    assert found.error(["A", "M", "Y"]) == pytest.approx(each.std(ddof=1) / np.sqrt(6))
    assert posterior(made).error(["A", "M", "Y"]) == 0


def test_it_sees_curves_without_a_slope_where_linear_regressions_do_not() -> None:
    made = curved(2000, 0)
    exact, flow = posterior(made), {edge: chance.mean() for edge, chance in edge_chances(made).items()}
    for edge in (("C", "M"), ("D", "Y")):
        assert exact.edge(*edge) < 0.2 and flow[edge] > 0.5
    assert flow["A", "M"] > 0.9 and flow["M", "Y"] > 0.9
    assert all(flow[edge] < 0.5 for edge in (("C", "A"), ("D", "A"), ("D", "M"), ("C", "Y")))


def test_scale_does_not_decide_and_a_seed_settles_all() -> None:
    made = curved(300, 0)
    columns = {name: made.matrix([name])[:, 0] * (1 if name == "A" else 1000.0) for name in "CDAMY"}
    scaled = edge_chances(EffectData(columns, "A", "Y", tiers=TIERS))
    assert all(np.abs(scaled[edge] - chance).max() < 0.02 for edge, chance in edge_chances(made).items())


def test_paths_by_a_flow_say_so() -> None:
    found = paths(curved(600, 0), posterior="flow", nuisances="spline")
    assert ("A", "M", "Y") in {one.nodes for one in found.found} and "by a flow, and not calibrated" in str(found)
    assert any(one.stability_error > 0 for one in found.found)
    with pytest.raises(InfluenceError, match="posterior='dag'; choose 'exact' or 'flow'"):
        paths(curved(600, 0), posterior="dag")  # type: ignore[arg-type]
