"""How probable each graph is, given the rows and an order of groups of nodes.

With tiers, a node's parents lie in earlier tiers, so every choice of parents' sets is a graph without cycles, and

    P(G | rows) = Πᵢ P(Paᵢ | rows),     P(Paᵢ) ∝ exp(−BICᵢ / 2),     BICᵢ = n log(residual variance) + |Paᵢ| log n

with linear regressions: exact, by all sets of a node's candidates. A path's stability, the probability that all of its
edges are there, is a product, for its edges end in different nodes. (Li et al., NeurIPS 2025, draw graphs with edge
probabilities σ(|W|) instead, which are ½ or more for every edge that is not there.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from ine_callback.effects.data import EffectData
from ine_callback.effects.formulas import Floats
from ine_callback.errors import InfluenceError
from ine_callback.utilities.tracking import Track, untracked

MOST_CANDIDATES = 12  # 2^12 sets for a node
Sets = dict[frozenset[str], float]


@dataclass(frozen=True)
class Posterior:
    """Probabilities of each node's set of parents; nodes are independent of each other.

    Attributes:
        parents: Node to sets with their probabilities, which sum to 1.
        copies: By a flow: probability of each edge in each of its copies [B]; None where exact.
    """

    parents: Mapping[str, Sets]
    copies: Mapping[tuple[str, str], Floats] | None = None

    def edge(self, cause: str, node: str) -> float:
        """Probability that one node is a parent of another."""
        return sum(chance for found, chance in self.parents[node].items() if cause in found)

    def stability(self, path: Sequence[str]) -> float:
        """Probability that all edges of a path are there."""
        return float(np.prod([self.edge(u, v) for u, v in pairwise(path)]))

    def error(self, path: Sequence[str]) -> float:
        """Standard error of a path's stability, by the scatter between copies; 0 where it is exact."""
        if self.copies is None:
            return 0.0
        each = np.prod([self.copies[edge] for edge in pairwise(path)], 0)
        return float(each.std(ddof=1) / np.sqrt(len(each)))

    def given(self, cause: str | None, node: str, smallest: float) -> Sets:
        """Probabilities of a node's sets, of those that hold a cause; sets of less than a share are left out."""
        found = {s: chance for s, chance in self.parents[node].items() if cause is None or cause in s}
        total = sum(found.values())
        found = {s: chance / total for s, chance in found.items() if chance >= smallest * total}
        return {s: chance / sum(found.values()) for s, chance in found.items()}


def posterior(data: EffectData, track: Track = untracked) -> Posterior:
    """The exact posterior under the data's tiers.

    Raises:
        InfluenceError: If the data has no tiers, a node more than 12 candidates, or several numbers a row.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.integers(0, 2, 500)
        >>> m, n = a + rng.normal(size=(2, 500)) * [[1.0], [1.0]]
        >>> columns = {"A": a, "M": m, "N": rng.normal(size=500), "Y": m + rng.normal(size=500)}
        >>> found = posterior(EffectData(columns, "A", "Y", tiers=[["A"], ["M", "N"], ["Y"]]))
        >>> round(found.stability(["A", "M", "Y"]), 2), round(found.stability(["A", "N", "Y"]), 2)
        (1.0, 0.0)
    """
    return Posterior({node: _sets(data, node, found) for node, found in track(candidates(data), "graphs")})


def of_edges(data: EffectData, copies: Mapping[tuple[str, str], Floats]) -> Posterior:
    """A posterior by edges that are independent of each other, such as a flow's.

    Args:
        data: With tiers.
        copies: Probability of each edge that the tiers allow, in each copy [B].

    Raises:
        InfluenceError: If a node has more than 12 candidates.
    """
    sets: dict[str, Sets] = {}
    for node, found in candidates(data):
        chance = np.array([copies[cause, node].mean() for cause in found])
        sets[node] = {
            frozenset(found[k] for k in chosen): float(
                np.prod(np.where(np.isin(range(len(found)), chosen), chance, 1 - chance))
            )
            for chosen in _subsets(range(len(found)))
        }
    return Posterior(sets, copies)


def candidates(data: EffectData) -> list[tuple[str, list[str]]]:
    """Each node with the nodes of earlier tiers.

    Raises:
        InfluenceError: If the data has no tiers, a node more than 12 candidates, or several numbers a row.
    """
    if data.tiers is None:
        raise InfluenceError('paths: needs an order of groups; give EffectData(tiers=[["C"], ["A"], ["M"], ["Y"]]).')
    earlier: list[str] = []
    found: list[tuple[str, list[str]]] = []
    for tier in data.tiers:
        found += [(node, list(earlier)) for node in tier]
        earlier += tier
    for node, causes in found:
        if len(causes) > MOST_CANDIDATES:
            raise InfluenceError(
                f"paths: {node!r} has {len(causes)} candidates for parents, and all their sets are compared, so at "
                f"most {MOST_CANDIDATES}; leave out columns, or join them into one node [rows, numbers]."
            )
        if causes and not data.single(node):
            raise InfluenceError(
                f"paths: {node!r} has several numbers a row and a tier above it; only the first tier may."
            )
    return found


def _sets(data: EffectData, node: str, causes: Sequence[str]) -> Sets:
    if not causes:
        return {frozenset(): 1.0}
    rows, target = len(data), data.matrix([node])[:, 0]
    target = target - target.mean()
    columns = [data.matrix([name]) for name in causes]
    joined = np.concatenate([column - column.mean(0) for column in columns], 1)
    joined = joined / np.maximum(joined.std(0), 1e-300)
    ends = np.cumsum([0, *(column.shape[1] for column in columns)])
    gram, product, total = joined.T @ joined, joined.T @ target, float(target @ target)
    scores: dict[frozenset[str], float] = {}
    for chosen in _subsets(range(len(causes))):
        at = [k for one in chosen for k in range(ends[one], ends[one + 1])]
        rest = total - _explained(gram, product, at)
        scores[frozenset(causes[one] for one in chosen)] = -0.5 * (
            rows * np.log(max(rest, 1e-12 * total) / rows) + len(at) * np.log(rows)
        )
    best = max(scores.values())
    weights = {found: float(np.exp(score - best)) for found, score in scores.items()}
    total = sum(weights.values())
    return {found: weight / total for found, weight in weights.items()}


def _explained(gram: Floats, product: Floats, at: Sequence[int]) -> float:
    if not at:
        return 0.0
    weights = np.linalg.lstsq(gram[np.ix_(at, at)], product[at], rcond=None)[0]
    return float(product[at] @ weights)


def _subsets(items: Iterable[int]) -> Iterable[tuple[int, ...]]:
    there = list(items)
    return (chosen for size in range(len(there) + 1) for chosen in combinations(there, size))
