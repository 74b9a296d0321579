"""Laws of discrete nodes as tables, on which effects and influence functions are exact sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from ine_callback.effects.formulas import cross_mean, potential_mean, weighted_controlled
from ine_callback.effects.graph import CausalGraph

Floats = NDArray[np.float64]
NOISE = 0.7  # standard deviation of Y around its mean

AUTHORS = {
    "back door": "B2 -> A; B2 -> G1; B2 -> G2; A -> G1 -> Y; G2 -> Y; A -> Y",
    "mediator": "A -> B1 -> G1 -> Y; G2 -> A; G2 -> Y; A -> Y",
}


@dataclass(frozen=True)
class Law:
    """States of all nodes but Y, their probabilities, and the mean of Y in each.

    Attributes:
        graph: With treatment A and outcome Y.
        at: Place of each node in a state.
        states: [S, nodes], 0 or 1.
        p: [S].
        mean: Of Y [S].
        table: Mean of Y by its sorted parents' values.
    """

    graph: CausalGraph
    at: dict[str, int]
    states: NDArray[np.int64]
    p: Floats
    mean: Floats
    table: Floats

    @property
    def treated(self) -> NDArray[np.bool_]:
        return self.states[:, self.at["A"]] == 1

    def keys(self, nodes: Any) -> NDArray[np.int64]:
        """A number for each state's values of some nodes [S]."""
        names = sorted(nodes)
        return self.states[:, [self.at[v] for v in names]] @ (2 ** np.arange(len(names)))

    def given(self, values: Floats, nodes: Any, among: NDArray[np.bool_] | None = None) -> Floats:
        """E[values | nodes] at each state [S], with the law restricted to some states."""
        p = self.p if among is None else self.p * among
        key, size = self.keys(nodes), 2 ** len(set(nodes))
        return (np.bincount(key, p * values, size) / np.maximum(np.bincount(key, p, size), 1e-300))[key]

    def with_(self, p: Floats) -> Law:
        return replace(self, p=p)


def random_law(graph: CausalGraph, rng: Any) -> Law:
    nodes = [v for v in nx.lexicographical_topological_sort(graph.graph) if v != "Y"]
    at = {v: i for i, v in enumerate(nodes)}
    states = np.array(list(product((0, 1), repeat=len(nodes))))
    p = np.ones(len(states))
    for v in nodes:
        parents = sorted(graph.parents(v))
        table = rng.uniform(0.15, 0.85, size=(2,) * len(parents))
        one = np.broadcast_to(table[tuple(states[:, at[u]] for u in parents)], len(states))
        p = p * np.where(states[:, at[v]] == 1, one, 1 - one)
    parents = sorted(graph.parents("Y"))
    table = rng.normal(size=(2,) * len(parents))
    return Law(graph, at, states, p, table[tuple(states[:, at[u]] for u in parents)], table)


def true_ate(law: Law) -> float:
    """By adjusting for the parents of A."""
    z = law.graph.parents("A")
    one, other = (law.given(law.mean, z, law.treated == arm) for arm in (True, False))
    return float(law.p @ (one - other))


def true_wcde(law: Law) -> float:
    """By the definition: Y's parents but A and M' follow their own law, which neither A nor M' changes."""
    parents = sorted(law.graph.parents("Y"))
    held = sorted(law.graph.mediators & set(parents))
    others = sorted(set(parents) - set(held) - {"A"})
    total = 0.0
    for m, o in product(product((0, 1), repeat=len(held)), product((0, 1), repeat=len(others))):
        value = dict(zip(held, m, strict=True)) | dict(zip(others, o, strict=True))
        chance = chance_of(law, held, m) * chance_of(law, others, o)
        for arm in (0, 1):
            total += (2 * arm - 1) * chance * law.table[tuple((value | {"A": arm})[u] for u in parents)]
    return total


def chance_of(law: Law, nodes: list[str], values: tuple[int, ...]) -> float:
    return float(law.p @ (law.states[:, [law.at[v] for v in nodes]] == values).all(1)) if nodes else 1.0


@dataclass(frozen=True)
class Exact:
    """An estimand's value, influence [S] and variance by exact nuisances; the weight of Y [S]."""

    value: float
    influence: Floats
    weight: Floats

    def variance(self, law: Law) -> float:
        return float(law.p @ (self.influence**2 + (NOISE * self.weight) ** 2))


def ate(law: Law, adjust: Any) -> Exact:
    share = law.given(law.treated.astype(float), adjust)
    terms, weights = [], []
    for arm, chance in ((True, share), (False, 1 - share)):
        weight = (law.treated == arm) / chance
        terms.append(potential_mean(law.mean, law.given(law.mean, adjust, law.treated == arm), weight))
        weights.append(weight)
    return finish(law, terms[0] - terms[1], weights[0] - weights[1])


def wcde(law: Law, adjust: Any, mu: Any = None, wrong_weight: Any = None) -> Exact:
    """With the adjustment set's own nuisances, or wrong ones: functions of arm and the exact ones."""
    inner, outer = set(adjust) & law.graph.mediators, set(adjust) - law.graph.mediators
    p1, p2, both = (mass(law, nodes) for nodes in (inner, outer, adjust))
    terms, weights = [], []
    for arm in (True, False):
        among = law.treated == arm
        mean = law.given(law.mean, adjust, among)
        mean = mean if mu is None else mu(arm, mean)
        with_arm = both * law.given(among.astype(float), adjust)
        weight = np.where(among, p1 * p2 / np.maximum(with_arm, 1e-300), 0.0)
        weight = weight if wrong_weight is None else wrong_weight(arm, weight)
        h1, h2 = independent(law, mean, inner, outer, adjust)
        terms.append(weighted_controlled(law.mean, mean, weight, h1, h2, float(law.p @ h1)))
        weights.append(weight)
    return finish(law, terms[0] - terms[1], weights[0] - weights[1])


def mass(law: Law, nodes: Any) -> Floats:
    """Probability of each state's values of some nodes [S]."""
    key = law.keys(nodes)
    return np.bincount(key, law.p, 2 ** len(set(nodes)))[key]


def independent(law: Law, mean: Floats, inner: Any, outer: Any, adjust: Any) -> tuple[Floats, Floats]:
    """Means of a function of both parts over independent draws of the other part."""
    k1, k2 = law.keys(inner), law.keys(outer)
    table = np.zeros((2 ** len(inner), 2 ** len(outer)))
    table[k1, k2] = mean
    m1, m2 = np.bincount(k1, law.p, len(table)), np.bincount(k2, law.p, table.shape[1])
    return (table @ m2)[k1], (m1 @ table)[k2]


def cross(law: Law, one: bool, other: bool, mediators: Any, adjust: Any, wrong: Any = None) -> Exact:
    """E[Y(one, M(other))]; ``wrong`` may replace π [S], the ratio of M's densities [S] and μ [S]."""
    is_one, is_other = law.treated == one, law.treated == other
    both = set(mediators) | set(adjust)
    share_one, share_other = (law.given(arm.astype(float), adjust) for arm in (is_one, is_other))
    late_one, late_other = (law.given(arm.astype(float), both) for arm in (is_one, is_other))
    ratio = late_other * share_one / (late_one * share_other)
    mu = law.given(law.mean, both, is_one)
    if wrong is not None:
        share_one, share_other, ratio, mu = wrong(share_one, share_other, ratio, mu)
    g = law.given(mu, adjust, is_other)
    weight = is_one / share_one * ratio
    return finish(law, cross_mean(law.mean, mu, weight, g, is_other / share_other), weight)


def finish(law: Law, terms: Floats, weight: Floats) -> Exact:
    value = float(law.p @ terms)
    return Exact(value, terms - value, weight)


def gateaux(law: Law, functional: Any, step: float = 1e-6) -> Floats:
    """Derivative of a functional of the law in each state's weight [S], by central differences."""
    found = []
    for state in range(len(law.p)):
        point = np.eye(len(law.p))[state]
        up, down = (functional(law.with_((1 - e) * law.p + e * point)) for e in (step, -step))
        found.append((up - down) / (2 * step))
    return np.array(found)
