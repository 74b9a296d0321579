"""What can be asked of a table: average, weighted controlled direct, natural direct and natural indirect effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ine_callback.effects import adjustment
from ine_callback.effects.adjustment import names
from ine_callback.effects.data import EffectData
from ine_callback.effects.formulas import Floats, cross_mean, potential_mean, weighted_controlled
from ine_callback.effects.graph import CausalGraph
from ine_callback.effects.nuisances import Nuisances
from ine_callback.errors import InfluenceError

Rows = NDArray[np.int64]
PARTNERS = 64  # rows that each row is paired with, for means over independent draws
MIXED = 2  # the same, for the ratio of densities
OPTIMAL = "optimal"


class Weighted(NamedTuple):
    """Rows of a fold that stand for all rows, in one part of an estimate.

    Attributes:
        weight: What their outcomes are multiplied with [n]; 0 where they are not looked at.
        columns: Whose weighted means should be those of all rows [n, k].
        reference: Weights of the rows that they stand for [n].
    """

    weight: Floats
    columns: Floats
    reference: Floats


class Fold(NamedTuple):
    """A part of the rows with the rows that its nuisances are fitted on.

    Attributes:
        train: Indices of these.
        test: Indices of the part's own rows.
        rng: Draws partners.
    """

    train: Rows
    test: Rows
    rng: np.random.Generator


class Terms(NamedTuple):
    """What each row of a fold adds.

    Attributes:
        values: [n]; their mean is the estimate.
        parts: By name.
    """

    values: Floats
    parts: dict[str, Weighted]


class Estimand:
    """Base of what can be asked: its adjustment sets, what it assumes, and each row's terms."""

    name: ClassVar[str]
    best: ClassVar[str] = "of the lowest variance"  # what the optimal set is
    adjust: str | Sequence[str]

    def faults(self, graph: CausalGraph, adjust: frozenset[str]) -> list[str]:
        """Why a set of columns is not valid, in words; empty if it is."""
        raise NotImplementedError

    def through(self, graph: CausalGraph) -> frozenset[str]:
        """The mediators that are asked about; none where the question names none."""
        return frozenset()

    def optimal(self, graph: CausalGraph) -> frozenset[str]:
        """The set that is taken unless nodes of it are hidden."""
        raise NotImplementedError

    def assumptions(self, graph: CausalGraph) -> tuple[str, ...]:
        """What must hold, in words."""
        raise NotImplementedError

    def terms(self, data: EffectData, adjust: frozenset[str], folds: Sequence[Fold], models: Nuisances) -> list[Terms]:
        """Terms of each fold's own rows, with nuisances of its training rows; those of all folds are fitted at once."""
        raise NotImplementedError

    def check(self, graph: CausalGraph) -> None:
        """Refuses graphs in which there is nothing to ask.

        Raises:
            InfluenceError: If so.
        """


@dataclass(frozen=True)
class ATE(Estimand):
    """Average treatment effect E[Y(1) − Y(0)]: all ways in which the treatment acts, together.

    Args:
        adjust: Names of columns, or ``"optimal"`` for the valid set of lowest variance.
    """

    adjust: str | Sequence[str] = OPTIMAL
    name: ClassVar[str] = "ATE"

    def faults(self, graph: CausalGraph, adjust: frozenset[str]) -> list[str]:
        return adjustment.ate_faults(graph, adjust)

    def optimal(self, graph: CausalGraph) -> frozenset[str]:
        return adjustment.optimal_for_ate(graph)

    def assumptions(self, graph: CausalGraph) -> tuple[str, ...]:
        return (
            f"the graph is right: nothing outside of it causes both {graph.treatment} and {graph.outcome}",
            f"rows of every kind occur with {graph.treatment} = 0 and with {graph.treatment} = 1",
            "one row's treatment does not change another row's outcome",
        )

    def terms(self, data: EffectData, adjust: frozenset[str], folds: Sequence[Fold], models: Nuisances) -> list[Terms]:
        z, a, y, rows = data.matrix(adjust), data.treated, data.outcome, masks(folds, len(data))
        shares = models.probabilities(z, a, rows)
        means = {arm: models.means(z, y, rows & (a == arm)) for arm in (True, False)}
        found = []
        for k, fold in enumerate(folds):
            test, share, arms, parts = fold.test, shares[k](z[fold.test]), [], {}
            for arm, chance in ((True, share), (False, 1 - share)):
                weight = (a[test] == arm) / chance
                parts[f"{data.graph.treatment} = {int(arm)}"] = Weighted(weight, z[test], np.ones(len(test)))
                arms.append(potential_mean(y[test], means[arm][k](z[test]), weight))
            found.append(Terms(arms[0] - arms[1], parts))
        return found


@dataclass(frozen=True)
class WCDE(Estimand):
    """Weighted controlled direct effect: the treatment is changed, the mediators are held at values of all rows.

    Σₘ (E[Y | do(A=1, m)] − E[Y | do(A=0, m)]) p(m), m over the mediators that are parents of the outcome (Lin, Guo,
    Gan, arXiv 2506.09871).

    Args:
        adjust: Names of columns, with mediators, or ``"optimal"`` for the valid set of lowest variance.
    """

    adjust: str | Sequence[str] = OPTIMAL
    name: ClassVar[str] = "WCDE"

    def faults(self, graph: CausalGraph, adjust: frozenset[str]) -> list[str]:
        return adjustment.wcde_faults(graph, adjust)

    def optimal(self, graph: CausalGraph) -> frozenset[str]:
        return adjustment.optimal_for_wcde(graph)

    def assumptions(self, graph: CausalGraph) -> tuple[str, ...]:
        held = names(graph.mediators & graph.parents(graph.outcome))
        return (
            f"the graph is right: nothing outside of it causes two of {graph.treatment}, {held} and {graph.outcome}",
            f"{held} could be held at any row's values, whatever the row's treatment and other columns are",
            "one row's treatment does not change another row's outcome",
        )

    def check(self, graph: CausalGraph) -> None:
        if not graph.mediators & graph.parents(graph.outcome):
            raise InfluenceError(
                f"WCDE: no mediator between {graph.treatment!r} and {graph.outcome!r} in the graph, so the direct "
                "effect is the whole one; ask ATE()."
            )

    def terms(self, data: EffectData, adjust: frozenset[str], folds: Sequence[Fold], models: Nuisances) -> list[Terms]:
        a, y, rows = data.treated, data.outcome, masks(folds, len(data))
        z1, z2 = data.matrix(adjust & data.graph.mediators), data.matrix(adjust - data.graph.mediators)
        z = np.concatenate([z1, z2], 1)
        mixed = [
            np.concatenate([z1[fold.train], z2[order]], 1)
            for fold in folds
            for order in shifted(fold.train, MIXED, fold.rng)
        ]
        owner = np.repeat(np.arange(len(folds)), [MIXED * len(fold.train) for fold in folds])
        of_mixed = owner == np.arange(len(folds))[:, None]
        arms: list[list[Floats]] = [[] for _ in folds]
        parts: list[dict[str, Weighted]] = [{} for _ in folds]
        for arm in (True, False):
            mine = rows & (a == arm)
            means = models.means(z, y, mine)
            # one ratio, of pairs drawn independently to the arm's rows, holds density ratio and propensity in one
            ratios = models.odds(np.concatenate(mixed), z, of_mixed, mine)
            for k, fold in enumerate(folds):
                test, mu = fold.test, means[k]
                weight = (a[test] == arm) * ratios[k](z[test]) * (rows[k].sum() / mine[k].sum())
                parts[k][f"{data.graph.treatment} = {int(arm)}"] = Weighted(weight, z[test], np.ones(len(test)))
                h1, h2 = paired_means(mu, z1[test], z2[test], fold.rng)
                arms[k].append(weighted_controlled(y[test], mu(z[test]), weight, h1, h2, float(h1.mean())))
        return [Terms(one - other, part) for (one, other), part in zip(arms, parts, strict=True)]


@dataclass(frozen=True)
class _Natural(Estimand):
    """Base of natural effects.

    Args:
        mediators: Names of the columns that carry the indirect effect, together; None: all between A and Y.
        adjust: Names of columns C, or ``"optimal"`` for the parents of treatment, mediators and outcome.
    """

    best: ClassVar[str] = "the parents of treatment, mediators and outcome"
    contrast: ClassVar[tuple[tuple[int, int], tuple[int, int]]]  # the treatment of Y and of the mediators: one, other
    mediators: Sequence[str] | None = None
    adjust: str | Sequence[str] = OPTIMAL

    def through(self, graph: CausalGraph) -> frozenset[str]:
        given = [self.mediators] if isinstance(self.mediators, str) else self.mediators
        return graph.mediators if given is None else frozenset(given)

    def faults(self, graph: CausalGraph, adjust: frozenset[str]) -> list[str]:
        return adjustment.mediation_faults(graph, self.through(graph), adjust)

    def optimal(self, graph: CausalGraph) -> frozenset[str]:
        return adjustment.for_mediation(graph, self.through(graph))

    def terms(self, data: EffectData, adjust: frozenset[str], folds: Sequence[Fold], models: Nuisances) -> list[Terms]:
        pairs = [[each[arms] for arms in self.contrast] for each in self.cross(data, adjust, folds, models)]
        return [Terms(one.values - other.values, one.parts | other.parts) for one, other in pairs]

    def assumptions(self, graph: CausalGraph) -> tuple[str, ...]:
        through = names(self.through(graph))
        return (
            f"the graph is right: nothing outside of it causes two of {graph.treatment}, {through} and {graph.outcome}",
            f"nothing that {graph.treatment} causes confounds {through} and {graph.outcome} (cross-world independence)",
            f"rows of every kind occur with both treatments, also given {through}",
            "one row's treatment does not change another row's outcome",
        )

    def check(self, graph: CausalGraph) -> None:
        wrong = sorted(self.through(graph) - graph.mediators)
        if wrong or not self.through(graph):
            what = f"{wrong[0]!r} does not lie" if wrong else "nothing lies"
            raise InfluenceError(
                f"{self.name}: {what} on a directed path from {graph.treatment!r} to {graph.outcome!r}; the graph's "
                f"mediators are {names(graph.mediators)}."
            )
        if self.through(graph) & graph.hidden:
            raise InfluenceError(
                f"{self.name}: the mediator {names(self.through(graph) & graph.hidden)} is hidden; name mediators that "
                "are columns."
            )

    def cross(
        self, data: EffectData, adjust: frozenset[str], folds: Sequence[Fold], models: Nuisances
    ) -> list[dict[tuple[int, int], Terms]]:
        """For each fold the terms of E[Y(a', M(a''))] for a', a'' = 1, 1 and 1, 0 and 0, 0."""
        a, y, c, rows = data.treated, data.outcome, data.matrix(adjust), masks(folds, len(data))
        mc = np.concatenate([data.matrix(self.through(data.graph)), c], 1)
        early, late = models.probabilities(c, a, rows), models.probabilities(mc, a, rows)
        means = {arm: models.means(c, y, rows & (a == arm)) for arm in (1, 0)}
        mus, others = models.means(mc, y, rows & a), rows & ~a
        inner = np.zeros(rows.shape)
        for mu, target, mine in zip(mus, inner, others, strict=True):
            target[mine] = mu(mc[mine])
        gs = models.means(c, inner, others)
        found: list[dict[tuple[int, int], Terms]] = []
        for k, fold in enumerate(folds):
            test, terms = fold.test, {}
            share, after = early[k](c[test]), late[k](mc[test])
            for arm, chance in ((1, share), (0, 1 - share)):
                weight = (a[test] == arm) / chance
                values = potential_mean(y[test], means[arm][k](c[test]), weight)
                part = Weighted(weight, c[test], np.ones(len(test)))
                terms[arm, arm] = Terms(values, {f"{data.graph.treatment} = {arm}": part})
            weight, reference = a[test] * (1 - after) / (after * (1 - share)), ~a[test] / (1 - share)
            values = cross_mean(y[test], mus[k](mc[test]), weight, gs[k](c[test]), reference)
            part = Weighted(weight, mc[test], reference)
            terms[1, 0] = Terms(values, {f"{data.graph.treatment} = 1, mediators as under 0": part})
            found.append(terms)
        return found


@dataclass(frozen=True)
class NDE(_Natural):
    """Natural direct effect E[Y(1, M(0)) − Y(0, M(0))]: the treatment changes, the mediators stay as without it.

    Args:
        mediators: Names of the mediators, together; None: all between treatment and outcome.
        adjust: Names of columns, or ``"optimal"`` for the parents of treatment, mediators and outcome.
    """

    name: ClassVar[str] = "NDE"
    contrast: ClassVar = ((1, 0), (0, 0))


@dataclass(frozen=True)
class NIE(_Natural):
    """Natural indirect effect E[Y(1, M(1)) − Y(1, M(0))]: what the mediators carry. NDE + NIE = ATE.

    Args:
        mediators: Names of the mediators, together; None: all between treatment and outcome.
        adjust: Names of columns, or ``"optimal"`` for the parents of treatment, mediators and outcome.
    """

    name: ClassVar[str] = "NIE"
    contrast: ClassVar = ((1, 1), (1, 0))


def masks(folds: Sequence[Fold], rows: int) -> NDArray[np.bool_]:
    """Which rows each fold's nuisances are fitted on [K, rows]."""
    found = np.zeros((len(folds), rows), dtype=bool)
    for mask, fold in zip(found, folds, strict=True):
        mask[fold.train] = True
    return found


def shifted(rows: Rows, count: int, rng: Any) -> list[Rows]:
    """The rows in up to ``count`` orders; no two orders have a row at one place.

    Example:
        >>> found = shifted(np.arange(4), 4, np.random.default_rng(0))
        >>> bool((np.sort(found, 0) == np.arange(4)[:, None]).all())
        True
    """
    order = rng.permutation(len(rows))
    place = np.argsort(order)
    steps = rng.permutation(len(rows))[:count]
    return [rows[order[(place + step) % len(rows)]] for step in steps]


def paired_means(mu: Any, z1: Floats, z2: Floats, rng: Any) -> tuple[Floats, Floats]:
    """h₁ and h₂ [n]: means of μ over independent draws of the other part, from up to 64 partners of each row.

    Each row is as often a partner as it has partners, so both have the same mean: of all pairs for n ≤ 64, beyond that
    of a balanced sample of them.
    """
    n = len(z1)
    h1, h2 = np.zeros(n), np.zeros(n)
    orders = shifted(np.arange(n), PARTNERS, rng)
    for order in orders:
        found = mu(np.concatenate([z1, z2[order]], 1))
        h1 += found
        h2[order] += found
    return h1 / len(orders), h2 / len(orders)
