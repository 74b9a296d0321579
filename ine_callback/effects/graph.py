"""Causal graphs as users write them: text, networkx, or tiers; and what a query about an effect asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ine_callback.errors import InfluenceError
from ine_callback.utilities.optional import need

Tiers = Sequence[Sequence[str]]
OWNER = "EffectData"
EXTRA = '"ine_callback[effects]"'


def networkx() -> Any:
    """The package, or a message how to install it."""
    return need("networkx", "ine_callback.effects", EXTRA)


@dataclass(frozen=True)
class CausalGraph:
    """A directed acyclic graph with a treatment and an outcome.

    Attributes:
        graph: ``networkx.DiGraph``.
        treatment: Name of the treatment A.
        outcome: Name of the outcome Y.
        hidden: Names of nodes that are in no column.

    Example:
        >>> found = causal_graph("A -> M -> Y; A -> Y; C -> A; C -> Y", "A", "Y")
        >>> sorted(found.mediators), sorted(found.parents("Y"))
        (['M'], ['A', 'C', 'M'])
    """

    graph: Any
    treatment: str
    outcome: str
    hidden: frozenset[str] = frozenset()

    @property
    def mediators(self) -> frozenset[str]:
        """M: nodes on directed paths from the treatment to the outcome."""
        return frozenset(self.descendants(self.treatment) & self.ancestors(self.outcome))

    @property
    def observed(self) -> tuple[str, ...]:
        """Nodes that may be adjusted for, sorted: all but treatment, outcome and the hidden ones."""
        return tuple(sorted(set(self.graph) - {self.treatment, self.outcome} - self.hidden))

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """From cause to effect, in the order in which they were given."""
        return tuple(self.graph.edges)

    def parents(self, node: str) -> frozenset[str]:
        """Direct causes of a node."""
        return frozenset(self.graph.predecessors(node))

    def descendants(self, node: str) -> frozenset[str]:
        """All that a node causes, without itself."""
        return frozenset(networkx().descendants(self.graph, node))

    def ancestors(self, node: str) -> frozenset[str]:
        """All causes of a node, without itself."""
        return frozenset(networkx().ancestors(self.graph, node))

    def causal_nodes(self, treatments: Iterable[str]) -> frozenset[str]:
        """Nodes on directed paths from some nodes to the outcome that meet these nodes at their start alone."""
        start = set(treatments)
        rest = self.graph.subgraph(set(self.graph) - start)
        to_outcome = networkx().ancestors(rest, self.outcome) | {self.outcome}
        first = {child for node in start for child in self.graph.successors(node)} & to_outcome
        return frozenset(first | {v for child in first for v in networkx().descendants(rest, child) & to_outcome})

    def forbidden(self, treatments: Iterable[str]) -> frozenset[str]:
        """What none may adjust for: the causal nodes with their descendants, without the treatments themselves."""
        start = set(treatments)
        causal = self.causal_nodes(start)
        return frozenset((causal | {v for node in causal for v in self.descendants(node)}) - start)

    def open_back_doors(self, treatments: Iterable[str], given: Iterable[str]) -> list[str]:
        """Which of some nodes have a path to the outcome that is open given others and not causal; sorted."""
        start, there, causal = set(treatments), set(given), self.causal_nodes(treatments)
        cut = self.graph.copy()
        cut.remove_edges_from([(u, v) for u in start for v in self.graph.successors(u) if v in causal])
        is_open = [t for t in sorted(start) if not networkx().is_d_separator(cut, {t}, {self.outcome}, there)]
        # an open path that runs through another of these nodes is that one's
        own = [t for t in is_open if not self._separated_without(cut, t, start - {t}, there)]
        return own or is_open

    def _separated_without(self, cut: Any, node: str, others: set[str], given: set[str]) -> bool:
        rest = cut.subgraph(set(cut) - others)
        return bool(networkx().is_d_separator(rest, {node}, {self.outcome}, given))

    def separated(self, x: Iterable[str], y: Iterable[str], given: Iterable[str], without: Iterable[str] = ()) -> bool:
        """Whether x and y are d-separated; ``without`` names nodes whose outgoing edges are removed first."""
        cut = self.graph.copy()
        cut.remove_edges_from([(u, v) for u in without for v in self.graph.successors(u)])
        left, right = set(x), set(y)
        return not left or not right or bool(networkx().is_d_separator(cut, left, right, set(given)))


def causal_graph(
    graph: str | Any | None, treatment: str, outcome: str, tiers: Tiers | None = None, hidden: Iterable[str] = ()
) -> CausalGraph:
    """A graph from what a user gives.

    Args:
        graph: ``"A -> M -> Y; C -> A"`` (edges parted by semicolons, commas or line breaks; a name alone is a node), or
            a ``networkx.DiGraph``; None with tiers.
        treatment: Name of the treatment.
        outcome: Name of the outcome.
        tiers: Groups of names in causal order; each node is then caused by all of the earlier groups.
        hidden: Names of nodes that nobody measured.

    Raises:
        InfluenceError: If it has a cycle, no treatment or outcome, or the outcome comes before the treatment.
    """
    if (graph is None) == (tiers is None):
        raise InfluenceError(f'{OWNER}: give either graph="A -> Y; ..." or tiers=[["A"], ["Y"]], and not both.')
    found = _of_tiers(tiers) if tiers is not None else _parsed(graph)
    if not networkx().is_directed_acyclic_graph(found):
        circle = [u for u, _ in networkx().find_cycle(found)]
        raise InfluenceError(
            f"{OWNER}: the graph has the cycle {' -> '.join([*circle, circle[0]])}; a cause cannot follow from its "
            "effect, so remove one of these edges."
        )
    unknown = sorted({treatment, outcome, *hidden} - set(found))
    if unknown:
        raise InfluenceError(
            f"{OWNER}: {', '.join(map(repr, unknown))} is no node of the graph, which has {sorted(found)}; write the "
            "names as the graph does."
        )
    if treatment == outcome:
        raise InfluenceError(f"{OWNER}: treatment and outcome are both {treatment!r}; name two columns.")
    made = CausalGraph(found, treatment, outcome, frozenset(hidden))
    if outcome in made.ancestors(treatment):
        raise InfluenceError(
            f"{OWNER}: the outcome {outcome!r} comes before the treatment {treatment!r}; exchange them, or turn the "
            "edges between them."
        )
    return made


def _parsed(graph: Any) -> Any:
    if not isinstance(graph, str):
        if not isinstance(graph, networkx().DiGraph):
            raise InfluenceError(
                f'{OWNER}: graph is a {type(graph).__name__}; give text such as "A -> M; M -> Y" or a networkx.DiGraph.'
            )
        return networkx().relabel_nodes(graph, {node: str(node) for node in graph})
    found = networkx().DiGraph()
    for line in graph.replace("\n", ";").replace(",", ";").split(";"):
        names = [name.strip() for name in line.replace("→", "->").split("->")]
        if names == [""] or names[0].startswith("#"):
            continue
        if not all(names):
            raise InfluenceError(f'{OWNER}: the graph\'s part {line.strip()!r} lacks a name; write "A -> B".')
        found.add_nodes_from(names)
        found.add_edges_from(pairwise(names))
    return found


def _of_tiers(tiers: Tiers) -> Any:
    names = [name for tier in tiers for name in tier]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InfluenceError(f"{OWNER}: {', '.join(map(repr, twice))} is in two tiers; name each column once.")
    found = networkx().DiGraph()
    found.add_nodes_from(names)
    for at, tier in enumerate(tiers):
        found.add_edges_from((u, v) for earlier in tiers[:at] for u in earlier for v in tier)
    return found
