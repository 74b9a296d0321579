"""Which columns to adjust for: validity in words, and the set of lowest variance.

ATE: Z holds no node on a causal path nor a descendant of one, and blocks all other paths (Shpitser et al. 2010). Lowest
variance: parents of the causal nodes (Henckel et al. 2022).

WCDE (Lin, Guo, Gan, arXiv 2506.09871). M = nodes between A and Y, M' = M ∩ parents of Y, Z₁ = Z ∩ M, Z₂ = Z without M:

    (1) Z blocks back-door paths between A and Y      (2) and between Z₁ and Y
    (3) and all directed paths from A through M to Y  (4) M' without Z₁ is independent of Pa(Y) without M', given Z₁

Lowest variance where no node is hidden: Pa(Y) without A. Unlike for the ATE it contains mediators.

NDE and NIE: C, none caused by A, such that nothing confounds A and Y, A and M, nor M and Y given A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations

from ine_callback.effects.graph import CausalGraph, networkx

LARGEST_SEARCH = 15  # nodes: 2^15 sets
Faults = Callable[[CausalGraph, frozenset[str]], list[str]]


def names(nodes: Iterable[str]) -> str:
    """Names as text.

    Example:
        >>> names({"b", "a"}), names([])
        ('{a, b}', '{}')
    """
    return "{" + ", ".join(sorted(nodes)) + "}"


def ate_faults(graph: CausalGraph, adjust: frozenset[str]) -> list[str]:
    """Why a set is not valid for the ATE, in words; empty if it is.

    Example:
        >>> from ine_callback.effects.graph import causal_graph
        >>> made = causal_graph("A -> M -> Y; C -> A; C -> Y", "A", "Y")
        >>> ate_faults(made, frozenset({"C"})), len(ate_faults(made, frozenset({"M"})))
        ([], 2)
    """
    start = [graph.treatment]
    faults = _of_forbidden(graph, start, adjust)
    return faults + [_open(graph, node, adjust) for node in graph.open_back_doors(start, adjust)]


def wcde_faults(graph: CausalGraph, adjust: frozenset[str]) -> list[str]:
    """Which of the four conditions a set breaks for the WCDE, in words; empty if it is valid.

    Example:
        >>> from ine_callback.effects.graph import causal_graph
        >>> made = causal_graph("A -> G1 -> Y; B2 -> A; B2 -> G1; B2 -> G2 -> Y; A -> Y", "A", "Y")
        >>> wcde_faults(made, frozenset({"G1", "G2"}))
        []
        >>> print(wcde_faults(made, frozenset({"B2", "G2"}))[0])
        condition 3: {B2, G2} does not block the directed path A -> G1 -> Y
    """
    inner = adjust & graph.mediators
    outer, start = adjust - inner, sorted({graph.treatment, *inner})
    faults = [f"condition 1: {fault}" for fault in _of_forbidden(graph, start, outer)]
    for node in graph.open_back_doors(start, outer):
        faults.append(f"condition {1 if node == graph.treatment else 2}: {_open(graph, node, adjust)}")
    rest = graph.graph.copy()
    rest.remove_nodes_from(inner)
    if rest.has_edge(graph.treatment, graph.outcome):
        rest.remove_edge(graph.treatment, graph.outcome)
    if networkx().has_path(rest, graph.treatment, graph.outcome):
        path = " -> ".join(networkx().shortest_path(rest, graph.treatment, graph.outcome))
        faults.append(f"condition 3: {names(adjust)} does not block the directed path {path}")
    parents = graph.parents(graph.outcome)
    direct = parents & graph.mediators
    if not graph.separated(direct - inner, parents - direct, inner):
        faults.append(
            f"condition 4: the mediators {names(direct - inner)} depend on {names(parents - direct)} given "
            f"{names(inner)}, so their marginal is not the one in the estimand"
        )
    return faults


def mediation_faults(graph: CausalGraph, mediators: frozenset[str], adjust: frozenset[str]) -> list[str]:
    """Why natural effects through some mediators are not identified given C, in words; empty if they are.

    Example:
        >>> from ine_callback.effects.graph import causal_graph
        >>> made = causal_graph("A -> L -> M -> Y; L -> Y; A -> Y", "A", "Y")
        >>> print(mediation_faults(made, frozenset({"M"}), frozenset())[0])
        M and Y have a common cause that {A} does not block
    """
    a, y = graph.treatment, graph.outcome
    faults = []
    if caused := adjust & graph.descendants(a):
        faults.append(f"{names(caused)} is caused by the treatment {a}")
    for node in (y, *sorted(mediators)):
        if not graph.separated([a], [node], adjust - {node}, without=[a]):
            faults.append(f"{a} and {node} have a common cause that {names(adjust)} does not block")
    for node in sorted(mediators):
        if not graph.separated([node], [y], adjust | {a}, without=mediators):
            faults.append(f"{node} and {y} have a common cause that {names(adjust | {a})} does not block")
    return faults


def optimal_for_ate(graph: CausalGraph) -> frozenset[str]:
    """Parents of the nodes on causal paths, that may be adjusted for (Henckel, Perković, Maathuis 2022)."""
    start = [graph.treatment]
    parents = {v for node in graph.causal_nodes(start) for v in graph.parents(node)}
    return frozenset(parents - graph.forbidden(start) - set(start))


def optimal_for_wcde(graph: CausalGraph) -> frozenset[str]:
    """Parents of the outcome without the treatment."""
    return graph.parents(graph.outcome) - {graph.treatment}


def for_mediation(graph: CausalGraph, mediators: frozenset[str]) -> frozenset[str]:
    """C: observed parents of treatment, mediators and outcome that the treatment does not cause."""
    nodes = {graph.treatment, graph.outcome, *mediators}
    causes = {v for node in nodes for v in graph.parents(node)} - nodes - graph.hidden
    return frozenset(causes - graph.descendants(graph.treatment))


def valid_sets(graph: CausalGraph, faults: Faults) -> Iterator[frozenset[str]]:
    """All valid sets of observed nodes, smallest first; of more than 15 nodes those of at most 3.

    Example:
        >>> from ine_callback.effects.graph import causal_graph
        >>> made = causal_graph("A -> G1 -> Y; B2 -> A; B2 -> G1; B2 -> G2 -> Y; A -> Y", "A", "Y")
        >>> [names(each) for each in valid_sets(made, wcde_faults)]
        ['{B2, G1}', '{G1, G2}', '{B2, G1, G2}']
    """
    nodes = graph.observed
    largest = len(nodes) if len(nodes) <= LARGEST_SEARCH else 3
    for size in range(largest + 1):
        for chosen in combinations(nodes, size):
            if not faults(graph, frozenset(chosen)):
                yield frozenset(chosen)


def _of_forbidden(graph: CausalGraph, start: list[str], adjust: frozenset[str]) -> list[str]:
    wrong = adjust & graph.forbidden(start)
    if not wrong:
        return []
    return [f"{names(wrong)} lies on a causal path to {graph.outcome}, or follows from one that does"]


def _open(graph: CausalGraph, node: str, adjust: frozenset[str]) -> str:
    return f"{names(adjust)} leaves a back-door path open between {node} and {graph.outcome}"
