"""Along which paths an effect runs, where the graph is not known but the order of groups of nodes is.

After SIGMA (Li et al., NeurIPS 2025): paths whose stability, the probability that all of their edges are there, is
large enough; the effect along each, averaged over the graphs that hold it:

    effect = Σ_G P(G | path) θ_G          variance = Σ_G P(G | path) (SE_G² + (θ_G − effect)²),   within + between

θ_G is a natural effect, adjusted for the graph's parents, where all mediators are of one tier: of A → M → Y the
indirect one through M, of A → Y the direct one. With more tiers a path's effect is not identified without a model if a
node on it has another way to Y; then it is the product of the coefficients of linear regressions on the parents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ine_callback.effects.data import EffectData
from ine_callback.effects.estimands import NDE, NIE, Estimand
from ine_callback.effects.estimation import check_rows, cross_fit, deal
from ine_callback.effects.formulas import Floats
from ine_callback.effects.nuisances import Nuisances
from ine_callback.effects.parsing import nuisances as parsed
from ine_callback.effects.posterior import Posterior, candidates, of_edges
from ine_callback.effects.posterior import posterior as exact
from ine_callback.errors import InfluenceError
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.tracking import Track, untracked
from ine_callback.utilities.words import number, plain, signed

if TYPE_CHECKING:
    from rich.console import Group

SMALLEST_SHARE = 1e-3  # of a node's sets of parents that effects are averaged over
FLOW = "Stabilities are by a flow, and not calibrated. "
NATURAL, LINEAR = "natural effect", "linear model"


@dataclass(frozen=True)
class PathEffect:
    """The effect along a path.

    Attributes:
        nodes: From the treatment to the outcome.
        stability: Probability that all of its edges are there.
        stability_error: Standard error of that, from a flow's copies; 0 where it is exact.
        effect: Averaged over the graphs that hold the path.
        influence: φ [N], averaged over them too; above 0: the row raises the effect.
        within: Mean squared standard error of a graph.
        between: Variance of the effect over graphs.
        by: ``"natural effect"`` or ``"linear model"``.
        effective_size: Of a natural effect, the smallest effective sample size of a graph; below 20, do not believe it.
        imbalance: Of a natural effect, the largest one of a graph, see :class:`Positivity`; above .25, the same.
    """

    nodes: tuple[str, ...]
    stability: float
    stability_error: float
    effect: float
    influence: Floats
    within: float
    between: float
    by: str
    effective_size: float
    imbalance: float

    @property
    def name(self) -> str:
        """The nodes, such as ``"A → M → Y"``."""
        return " → ".join(self.nodes)

    @property
    def standard_error(self) -> float:
        """Of the effect, given that the path is there."""
        return float(np.sqrt(self.within + self.between))

    @property
    def averaged(self) -> tuple[float, float]:
        """Effect over all graphs, 0 where the path is missing, with its standard error: shrunk towards 0."""
        s, mean = self.stability, self.effect
        return s * mean, float(np.sqrt(s * (self.within + self.between) + s * (1 - s) * mean**2))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as plain types for JSON; a natural effect's positivity is NaN of a linear one."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "influence"}

    @classmethod
    def from_dict(cls, words: dict[str, Any], influence: Floats) -> PathEffect:
        """What :meth:`to_dict` gave, also after JSON, with the rows' influence.

        Raises:
            KeyError: Or TypeError, or ValueError, if it is something else.
        """
        names = [each.name for each in fields(cls) if each.name not in ("nodes", "by", "influence")]
        numbers = {name: np.nan if words[name] is None else float(words[name]) for name in names}
        return cls(nodes=tuple(map(str, words["nodes"])), by=str(words["by"]), influence=influence, **numbers)


@dataclass(frozen=True)
class Paths:
    """Paths by stability; ``print`` shows them.

    Attributes:
        found: Most stable first.
        posterior: Probabilities of the graphs.
        tau: Smallest stability.
    """

    found: tuple[PathEffect, ...]
    posterior: Posterior
    tau: float

    def __rich__(self) -> Group:
        return render_paths(self.found, self.tau, self.posterior.copies is not None)

    def __str__(self) -> str:
        return as_text(self)


def paths(
    data: EffectData,
    tau: float = 0.15,
    nuisances: str | tuple[Any, Any] | Nuisances = "linear",
    folds: int = 5,
    seed: int = 0,
    posterior: Literal["exact", "flow"] = "exact",
    track: Track = untracked,
) -> Paths:
    """Paths from the treatment to the outcome, with the effect along each.

    Args:
        data: With tiers.
        tau: Paths of a smaller stability are left out.
        nuisances: As of :func:`estimate`, for natural effects.
        folds: Of cross-fitting.
        seed: Deals the rows into folds.
        posterior: ``"exact"``, of linear regressions; ``"flow"``: by a :class:`~ine_callback.effects.FlowSEM`, which
            sees curves that have no slope, and whose probabilities are not calibrated.
        track: Shows a bar.

    Raises:
        InfluenceError: If the data has no tiers, a node too many candidates, or ``tau`` is not within 0 and 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.integers(0, 2, 1000)
        >>> m, other = a + rng.normal(size=1000), rng.normal(size=1000)
        >>> columns = {"A": a, "M": m, "N": other, "Y": 2 * m + rng.normal(size=1000)}
        >>> found = paths(EffectData(columns, "A", "Y", tiers=[["A"], ["M", "N"], ["Y"]]))
        >>> [(one.nodes, round(one.effect), one.by) for one in found.found]
        [(('A', 'M', 'Y'), 2, 'natural effect')]
    """
    if not 0 < tau <= 1:
        raise InfluenceError(f"paths: tau={tau:g}; give a probability above 0, such as .15.")
    if posterior not in ("exact", "flow"):
        raise InfluenceError(f"paths: posterior={posterior!r}; choose 'exact' or 'flow'.")
    check_rows(data, folds)
    models, graphs = parsed(nuisances), exact(data, track) if posterior == "exact" else _flow(data, seed)
    fold = deal(data.treated, folds, np.random.default_rng(seed))
    stable = sorted(_stable(graphs, data, tau), key=graphs.stability, reverse=True)
    natural = _one_tier(data)
    effects = {
        path: _natural(data, graphs, path, models, fold, seed) if natural else _linear(data, graphs, path)
        for path in track(stable, "effects along paths")
    }
    by = NATURAL if natural else LINEAR
    return Paths(tuple(_averaged(path, graphs, each, by) for path, each in effects.items()), graphs, tau)


def _flow(data: EffectData, seed: int) -> Posterior:
    candidates(data)  # refuses what would be refused after the training
    from ine_callback.effects.flow import edge_chances  # with torch and Lightning

    return of_edges(data, edge_chances(data, seed))


class Found(NamedTuple):
    """What a graph says of a path: its share, the effect, influence [N], and positivity of a natural effect."""

    share: float
    effect: float
    influence: Floats
    effective_size: float = np.nan
    imbalance: float = np.nan


def _averaged(path: tuple[str, ...], graphs: Posterior, each: Sequence[Found], by: str) -> PathEffect:
    share, effect = np.array([one.share for one in each]), np.array([one.effect for one in each])
    influence = np.stack([one.influence for one in each])
    mean, rows = float(share @ effect), influence.shape[1]
    within = float(share @ (influence**2).sum(1)) / rows**2
    between = float(share @ (effect - mean) ** 2)
    size, imbalance = min(one.effective_size for one in each), max(one.imbalance for one in each)
    return PathEffect(
        path, graphs.stability(path), graphs.error(path), mean, share @ influence, within, between, by, size, imbalance
    )


def _stable(graphs: Posterior, data: EffectData, tau: float) -> Iterator[tuple[str, ...]]:
    """Paths whose stability is at least tau; a longer one is never stabler than its beginning."""

    def extend(path: tuple[str, ...], stability: float) -> Iterator[tuple[str, ...]]:
        for child, sets in graphs.parents.items():
            chance = stability * graphs.edge(path[-1], child) if sets else 0.0
            if chance >= tau:
                if child == data.graph.outcome:
                    yield (*path, child)
                else:
                    yield from extend((*path, child), chance)

    yield from extend((data.graph.treatment,), 1.0)


def _one_tier(data: EffectData) -> bool:
    """Whether all mediators are of one tier, and treatment and outcome of others."""
    assert data.tiers is not None
    at = {node: k for k, tier in enumerate(data.tiers) for node in tier}
    return at[data.graph.outcome] - at[data.graph.treatment] <= 2


def _natural(
    data: EffectData, graphs: Posterior, path: tuple[str, ...], models: Nuisances, fold: Any, seed: int
) -> list[Found]:
    """Natural effects by what graphs adjust for: graphs that do not differ in it are one."""
    causes = _before(data)
    asked: dict[tuple[Estimand, frozenset[str]], float] = {}
    for parents, share in _graphs(graphs, path, data):
        if len(path) == 3:
            estimand: Estimand = NIE(mediators=(path[1],))
        else:
            after = parents[data.graph.outcome] - causes - {data.graph.treatment}
            estimand = NDE(mediators=tuple(sorted(after)))
        adjust = frozenset().union(*parents.values()) & causes
        asked[estimand, adjust] = asked.get((estimand, adjust), 0.0) + share
    folds, found = int(fold.max()) + 1, []
    kept = {one: share for one, share in asked.items() if share >= SMALLEST_SHARE}
    for (estimand, adjust), share in kept.items():
        fit = cross_fit(data, estimand, [adjust] * folds, models, fold, seed)
        checks = fit.positivity
        size, imbalance = checks.smallest, max(checks.imbalance.values())
        found.append(Found(share / sum(kept.values()), fit.estimate, fit.influence, size, imbalance))
    return found


def _before(data: EffectData) -> frozenset[str]:
    """Nodes that the treatment cannot cause."""
    assert data.tiers is not None
    until = next(k for k, tier in enumerate(data.tiers) if data.graph.treatment in tier)
    return frozenset(node for tier in data.tiers[: until + 1] for node in tier) - {data.graph.treatment}


def _graphs(
    graphs: Posterior, path: tuple[str, ...], data: EffectData
) -> Iterator[tuple[Mapping[str, frozenset[str]], float]]:
    """Sets of parents of treatment and path, of the graphs that hold the path, with their shares."""
    sets = {v: graphs.given(u, v, SMALLEST_SHARE) for u, v in pairwise(path)}
    sets[data.graph.treatment] = graphs.given(None, data.graph.treatment, SMALLEST_SHARE)
    for chosen in product(*(each.items() for each in sets.values())):
        yield dict(zip(sets, (one for one, _ in chosen), strict=True)), float(np.prod([share for _, share in chosen]))


def _linear(data: EffectData, graphs: Posterior, path: tuple[str, ...]) -> list[Found]:
    """Products of coefficients, one for each choice of the path's sets of parents."""
    steps = [
        [(share, *_coefficient(data, u, v, found)) for found, share in graphs.given(u, v, SMALLEST_SHARE).items()]
        for u, v in pairwise(path)
    ]
    return [_product(chosen) for chosen in product(*steps)]


def _product(chosen: Sequence[tuple[float, float, Floats]]) -> Found:
    share, effect, influence = 1.0, 1.0, np.zeros_like(chosen[0][2])
    for chance, coefficient, moved in chosen:
        influence = influence * coefficient + effect * moved
        share, effect = share * chance, effect * coefficient
    return Found(share, effect, influence)


def _coefficient(data: EffectData, cause: str, node: str, parents: frozenset[str]) -> tuple[float, Floats]:
    """Coefficient of a cause in the regression of a node on its parents, with its influence function [N]."""
    x = np.c_[data.matrix([cause]), data.matrix(parents - {cause}), np.ones(len(data))]
    y, inverse = data.matrix([node])[:, 0], np.linalg.pinv(x.T @ x / len(data))
    weights = inverse @ (x.T @ y) / len(data)
    return float(weights[0]), (x @ inverse[0]) * (y - x @ weights)


def render_paths(found: Sequence[PathEffect], tau: float, flow: bool) -> Group:
    """Paths as a table for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title="effects along paths", title_justify="left")
    for head in ("path", "stability", "effect", "± se", "over all graphs", "by", "n_eff", "imbalance"):
        table.add_column(head, justify="left" if head in ("path", "by") else "right")
    for one in found:
        table.add_row(
            plain(one.name),
            number(one.stability, 2) + (f" ± {number(one.stability_error, 2)}" if one.stability_error else ""),
            signed(one.effect, 3),
            number(one.standard_error, 3),
            signed(one.averaged[0], 3),
            one.by,
            number(one.effective_size, 0),
            number(one.imbalance, 2),
        )
    words = (
        f"{FLOW if flow else ''}Paths of stability {tau:g} or more, given the order of the tiers. Effects are of "
        "graphs that hold the path; a path chosen for being stable may look stronger than it is."
    )
    return Group(table, Text(words))
