"""A causal graph from rows, by causal-learn: what their independences say, and what they leave open in words."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from io import StringIO
from typing import Any

import numpy as np

from ine_callback.effects.data import Columns, numbers
from ine_callback.effects.graph import EXTRA, Tiers
from ine_callback.errors import InfluenceError
from ine_callback.utilities.optional import need

WHO = "discovered_graph"


def discovered_graph(
    columns: Columns, tiers: Tiers | None = None, decided: Sequence[tuple[str, str]] = (), alpha: float = 0.01
) -> str:
    """A graph for :class:`EffectData` by the PC algorithm (Spirtes, Glymour, Scheines 2000) of causal-learn.

    By Fisher's z, so for columns that are about jointly normal. Independences leave the direction of some edges open;
    these are named and refused, for an effect depends on them. A graph found in the rows whose effects are then
    estimated is a suggestion: intervals do not know that it was chosen. Where only the order of groups is known,
    :func:`~ine_callback.effects.paths` averages over graphs instead.

    Args:
        columns: Names to numbers [N], at least three.
        tiers: Groups of names in causal order, of which no later one causes an earlier one; directions within a group
            are left to the rows.
        decided: Edges from cause to effect that you know, in place of what the rows leave open.
        alpha: Level of the tests of independence.

    Raises:
        InfluenceError: If directions stay open or the columns cannot be tested.
        ImportError: Without the extra ``effects``.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.normal(size=(2, 2000))
        >>> c = a + b + 0.5 * rng.normal(size=2000)
        >>> d = c + 0.5 * rng.normal(size=2000)
        >>> discovered_graph({"A": a, "B": b, "C": c, "D": d})  # doctest: +SKIP
        'A -> C; B -> C; C -> D'
    """
    search = need("causallearn.search.ConstraintBased.PC", f"ine_callback.effects.{WHO}", EXTRA)
    knowledge = need("causallearn.utils.PCUtils.BackgroundKnowledge", f"ine_callback.effects.{WHO}", EXTRA)
    nodes = need("causallearn.graph.GraphNode", f"ine_callback.effects.{WHO}", EXTRA)
    names = [str(name) for name in columns]
    if wide := [name for name in columns if numbers(str(name), columns[name]).shape[1] != 1]:
        raise InfluenceError(f"{WHO}: column {wide[0]!r} has several numbers a row; give one.")
    mentioned = [name for group in (*(tiers or ()), *decided) for name in group]
    if unknown := [name for name in mentioned if name not in names]:
        raise InfluenceError(f"{WHO}: {unknown[0]!r} is no column; the columns are {names}.")
    table = np.concatenate([numbers(str(name), columns[name]) for name in columns], 1)
    if len(names) < 3 or bool((table.std(0) == 0).any()) or not np.isfinite(table).all():
        raise InfluenceError(f"{WHO}: needs at least three columns of finite numbers that vary; drop the others.")
    known: Any = knowledge.BackgroundKnowledge()
    made = {name: nodes.GraphNode(name) for name in names}
    for k, tier in enumerate(tiers or ()):
        for name in tier:
            known.add_node_to_tier(made[name], k)
    for u, v in decided:
        known.add_required_by_node(made[u], made[v]).add_forbidden_by_node(made[v], made[u])
    with contextlib.redirect_stdout(StringIO()):  # it says what it orients
        found = search.pc(
            table, alpha, "fisherz", background_knowledge=known, node_names=names, show_progress=False
        ).G.graph
    return _text(found, names)


def _text(found: Any, names: Sequence[str]) -> str:
    """Edges as text; ``found[j, i] = 1`` and ``found[i, j] = -1`` is i -> j."""
    edges, still_open = [], []
    for i, u in enumerate(names):
        for j, v in enumerate(names):
            if found[j, i] == 1 and found[i, j] == -1:
                edges.append(f"{u} -> {v}")
            elif i < j and found[i, j] != 0 and found[i, j] == found[j, i]:
                still_open.append((u, v))
    if still_open:
        listed = ", ".join(f"{u} and {v}" for u, v in still_open)
        raise InfluenceError(
            f"{WHO}: the rows leave open which causes which: {listed}; say it by tiers=, or by "
            f"decided=[{still_open[0]!r}]."
        )
    linked = {name for edge in edges for name in edge.split(" -> ")}
    return "; ".join([*edges, *(name for name in names if name not in linked)])
