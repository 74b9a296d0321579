"""From a table and a question to an estimate: adjustment set, cross-fitting, each row's influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.effects.adjustment import names, valid_sets
from ine_callback.effects.data import EffectData
from ine_callback.effects.effect import Effect
from ine_callback.effects.estimands import OPTIMAL, Estimand, Fold, Rows, Weighted
from ine_callback.effects.formulas import Floats
from ine_callback.effects.graph import CausalGraph
from ine_callback.effects.nuisances import Nuisances
from ine_callback.effects.parsing import nuisances
from ine_callback.effects.positivity import Positivity, positivity
from ine_callback.errors import InfluenceError
from ine_callback.utilities.tracking import Track, untracked

SMALLEST_FOLD, SMALLEST_ARM, SMALLEST_SAMPLE = 50, 10, 20
LARGEST_IMBALANCE = 0.25  # standard deviations (Rubin 2001; Stuart 2010)
MOST_SETS = 32  # that are compared by their estimated variance
COMPARED_FOLDS = 2


def estimate(
    data: EffectData,
    estimand: Estimand,
    nuisances: str | tuple[Any, Any] | Nuisances = "spline",
    folds: int = 5,
    seed: int = 0,
    refuse: bool = True,
    track: Track = untracked,
) -> Effect:
    """Estimates an effect, and each row's influence on the estimate.

    The nuisances of a fold's rows are fitted on the other folds. Where the set of lowest variance is not known from the
    graph, for a node is hidden, each half of the folds takes the valid set whose estimated variance is lowest on the
    other half.

    Args:
        data: Columns with their graph.
        estimand: ``ATE()``, ``WCDE()``, ``NDE()`` or ``NIE()``.
        nuisances: ``"spline"``, ``"linear"``, ``"network"`` or :class:`~ine_callback.effects.Networks`, or (regressor,
            classifier) with scikit-learn's methods.
        folds: Of cross-fitting.
        seed: Deals the rows into folds.
        refuse: Whether weights that show a lack of positivity are an error: an effective sample size below 20, or means
            of weighted rows more than .25 standard deviations from those that they stand for.
        track: Shows a bar.

    Raises:
        InfluenceError: If no set is valid, which names the broken conditions; on too few rows a fold; or if the
            effective sample size shows that rows of some kind hardly occur with one treatment.

    Example:
        >>> from ine_callback.effects import ATE
        >>> rng = np.random.default_rng(0)
        >>> c = rng.normal(size=2000)
        >>> a = rng.random(2000) < 1 / (1 + np.exp(-c))
        >>> y = 2.0 * a + c + rng.normal(size=2000)
        >>> found = estimate(EffectData({"C": c, "A": a, "Y": y}, "A", "Y", "C -> A -> Y; C -> Y"), ATE(), "linear")
        >>> found
        Effect(ATE 2.055 ± 0.05, 2000 rows)
        >>> found.adjustment, found.top(3)
        ((('C',),), array([1338, 1258,  313]))
    """
    models = _models(nuisances)
    check_question(data.graph, estimand)
    check_rows(data, folds)
    fold = deal(data.treated, folds, np.random.default_rng(seed))
    choice = choose(data, estimand, models, fold, seed, track)
    found = cross_fit(data, estimand, choice.sets, models, fold, seed, track)
    if refuse:
        _check_positivity(estimand.name, found.positivity)
    graph = data.graph
    adjusted = tuple(dict.fromkeys(tuple(sorted(each)) for each in choice.sets))
    return Effect(
        estimand.name, graph.treatment, graph.outcome, found.estimate, found.influence, adjusted, choice.why,
        estimand.assumptions(graph), found.positivity, folds, models.name, tuple(sorted(estimand.through(graph))),
        graph.edges,
    )  # fmt: skip


_models = nuisances  # the argument of the same name hides it


@dataclass(frozen=True)
class Choice:
    """Adjustment sets of each fold, and why these."""

    sets: tuple[frozenset[str], ...]
    why: str


@dataclass(frozen=True)
class CrossFit:
    """What cross-fitting found: the estimate, influence [N], and what its weights say."""

    estimate: float
    influence: Floats
    positivity: Positivity


def deal(treated: NDArray[np.bool_], folds: int, rng: Any) -> Rows:
    """Each row's fold [N], with the treated dealt evenly."""
    fold = np.empty(len(treated), dtype=np.int64)
    start = 0
    for arm in (True, False):
        mine = rng.permutation(np.flatnonzero(treated == arm))
        fold[mine] = (start + np.arange(len(mine))) % folds
        start += len(mine)
    return fold


def choose(data: EffectData, estimand: Estimand, models: Nuisances, fold: Rows, seed: int, track: Track) -> Choice:
    """The adjustment set of each fold, of a question that :func:`check_question` lets through.

    Raises:
        InfluenceError: If the named set is not valid.
    """
    graph, folds = data.graph, int(fold.max()) + 1
    if estimand.adjust != OPTIMAL:
        return Choice((_named(graph, estimand),) * folds, "you named it; it is valid in this graph")
    best = estimand.optimal(graph)
    if not best & graph.hidden and not estimand.faults(graph, best):
        return Choice((best,) * folds, f"valid in this graph: {estimand.best}")
    candidates = list(islice(valid_sets(graph, estimand.faults), MOST_SETS))
    if len(candidates) == 1:
        return Choice((candidates[0],) * folds, "the only valid set without hidden nodes")
    half = fold % 2
    chosen: list[frozenset[str]] = []
    for side in (0, 1):
        rows = np.flatnonzero(half != side)  # the other half chooses
        variances = [
            _variance(data, estimand, each, models, rows, seed) for each in track(candidates, "adjustment sets")
        ]
        chosen.append(candidates[int(np.argmin(variances))])
    why = (
        f"of {len(candidates)} valid sets without hidden nodes, the one of the lowest estimated variance; each half of "
        "the folds chose for the other"
    )
    return Choice(tuple(chosen[k % 2] for k in range(folds)), why)


def cross_fit(
    data: EffectData,
    estimand: Estimand,
    sets: Sequence[frozenset[str]],
    models: Nuisances,
    fold: Rows,
    seed: int,
    track: Track = untracked,
) -> CrossFit:
    """The estimate with nuisances of each fold from all other folds.

    Args:
        data: Columns with their graph.
        estimand: What is asked.
        sets: Adjustment set of each fold.
        models: Regressions and classifiers.
        fold: Each row's fold [N]; −1 leaves the row out.
        seed: Draws partners.
        track: Shows a bar.
    """
    terms = np.zeros(len(data))
    parts: dict[tuple[str, frozenset[str]], list[Weighted]] = {}
    each = [
        Fold(np.flatnonzero((fold != k) & (fold >= 0)), np.flatnonzero(fold == k), np.random.default_rng([seed, k]))
        for k in range(len(sets))
    ]
    for adjust in track(list(dict.fromkeys(sets)), estimand.name):
        mine = [one for one, chosen in zip(each, sets, strict=True) if chosen == adjust]
        for one, found in zip(mine, estimand.terms(data, adjust, mine, models), strict=True):
            terms[one.test] = found.values
            for name, part in found.parts.items():
                parts.setdefault((name, adjust), []).append(part)
    there = fold >= 0
    value = float(terms[there].mean())
    return CrossFit(value, np.where(there, terms - value, 0.0), positivity(parts))


def _variance(
    data: EffectData, estimand: Estimand, adjust: frozenset[str], models: Nuisances, rows: Rows, seed: int
) -> float:
    """Estimated asymptotic variance of the estimator with a set, on some rows."""
    fold = np.full(len(data), -1, dtype=np.int64)
    fold[rows] = deal(data.treated[rows], COMPARED_FOLDS, np.random.default_rng(seed))
    found = cross_fit(data, estimand, [adjust] * COMPARED_FOLDS, models, fold, seed)
    return float((found.influence[rows] ** 2).mean())


def check_question(graph: CausalGraph, estimand: Estimand) -> None:
    """Refuses what no rows could answer in this graph.

    Raises:
        InfluenceError: If there is nothing to ask, or the named set, or any set, is not valid.
    """
    estimand.check(graph)
    if estimand.adjust != OPTIMAL:
        _named(graph, estimand)
        return
    best = estimand.optimal(graph) - graph.hidden
    faults = estimand.faults(graph, best)
    if faults and next(valid_sets(graph, estimand.faults), None) is None:
        raise InfluenceError(f"{estimand.name}: no set of columns is valid. Of {names(best)}: {'; '.join(faults)}.")


def _named(graph: CausalGraph, estimand: Estimand) -> frozenset[str]:
    chosen = frozenset([estimand.adjust] if isinstance(estimand.adjust, str) else estimand.adjust)
    if unknown := sorted(chosen - set(graph.observed)):
        raise InfluenceError(
            f"{estimand.name}: {', '.join(map(repr, unknown))} cannot be adjusted for; choose among {graph.observed}."
        )
    if faults := estimand.faults(graph, chosen):
        better = next(valid_sets(graph, estimand.faults), None)
        remedy = "no set of columns is" if better is None else f"{names(better)} is"
        raise InfluenceError(f"{estimand.name}: {names(chosen)} is not valid, {remedy}: {'; '.join(faults)}.")
    return chosen


def check_rows(data: EffectData, folds: int) -> None:
    """Refuses too few rows.

    Raises:
        InfluenceError: If so, or on fewer than two folds.
    """
    if folds < 2:
        raise InfluenceError(f"estimate: folds={folds}; nuisances need rows of other folds, so take 2 or more.")
    if len(data) < folds * SMALLEST_FOLD:
        raise InfluenceError(
            f"estimate: {len(data)} rows in {folds} folds are fewer than {SMALLEST_FOLD} a fold; take fewer folds or "
            "more rows."
        )
    smaller = int(min(data.treated.sum(), (~data.treated).sum()))
    if smaller < folds * SMALLEST_ARM:
        raise InfluenceError(
            f"estimate: {smaller} rows with the rarer treatment in {folds} folds are fewer than {SMALLEST_ARM} a fold; "
            "take fewer folds or more rows."
        )


def _check_positivity(name: str, found: Positivity) -> None:
    remedy = "adjust for fewer columns, or keep rows of kinds that occur with both treatments"
    for part, size in found.effective_size.items():
        if size < SMALLEST_SAMPLE:
            raise InfluenceError(
                f"{name}: positivity fails: for {part!r} the rows are worth {size:.1f} equally weighted ones, fewer "
                f"than {SMALLEST_SAMPLE}; {remedy}."
            )
        if found.imbalance[part] > LARGEST_IMBALANCE:
            raise InfluenceError(
                f"{name}: positivity fails: for {part!r} the weighted rows differ from those that they stand for by "
                f"{found.imbalance[part]:.2f} standard deviations of a column, so whole kinds of rows are missing; "
                f"{remedy}."
            )
