"""Effects as they lie in a report: one attribution whose queries are estimands, and what reads it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ine_callback.effects.effect import Effect, render
from ine_callback.effects.estimation import LARGEST_IMBALANCE, SMALLEST_SAMPLE
from ine_callback.effects.path_effects import PathEffect, Paths, render_paths
from ine_callback.errors import InfluenceError
from ine_callback.scores import Attribution, Check, QueryInfo
from ine_callback.utilities.jsonable import jsonable
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.words import signed

if TYPE_CHECKING:
    from rich.console import Group

NAME = "effects"  # of the method in reports
KIND = "estimand"
REMOVAL = "removal"
WHO = "report.effects"
REMEDY = "adjust for fewer columns, or keep rows of kinds that occur with both treatments"
LEGEND = (
    'φ > 0: the row raises the estimate; it neither helps nor harms. "Without it" is what leaving the row out adds to '
    "the estimate, −φ / (n − 1)."
)


def attribution(
    found: Sequence[Effect | Paths], rows: ArrayLike | None = None, notes: Sequence[str] = ()
) -> Attribution:
    """Effects and paths of the same rows in the form in which reports hold scores.

    Args:
        found: At least one; of several :class:`Paths` the first only is possible.
        rows: Dataset index of each row of their data [n]; None: 0 to n − 1.
        notes: Sentences for the reader.

    Raises:
        InfluenceError: If they are of different numbers of rows, or ask one thing twice.
    """
    effects = [each for each in found if isinstance(each, Effect)]
    sought = [each for each in found if isinstance(each, Paths)]
    if len(effects) + len(sought) < len(found) or not found or len(sought) > 1:
        kinds = ", ".join(type(each).__name__ for each in found) or "nothing"
        raise InfluenceError(f"{WHO}: got {kinds}; give Effects by estimate(...) and at most one Paths by paths(...).")
    along = [one for each in sought for one in each.found]
    both: list[Effect | PathEffect] = [*effects, *along]
    names = [one.name for one in both]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InfluenceError(f"{WHO}: {twice[0]!r} is there twice; give each question once.")
    sizes = sorted({len(one.influence) for one in both})
    if len(sizes) != 1:
        raise InfluenceError(
            f"{WHO}: effects have {sizes or 'no'} rows; all must be of the same rows, and one at least."
        )
    index = np.arange(sizes[0]) if rows is None else np.asarray(rows)
    if len(index) != sizes[0]:
        raise InfluenceError(f"{WHO}: rows names {len(index)} rows, and the effects have {sizes[0]}.")
    influence = np.stack([one.influence for one in both], 1)
    posterior = sought[0].posterior if sought else None
    edges = [] if posterior is None else [
        [u, v, posterior.edge(u, v)] for v, sets in posterior.parents.items() for u in sorted(frozenset().union(*sets))
    ]  # fmt: skip
    return Attribution(
        NAME,
        index,
        tuple(QueryInfo(one.name, "estimand", _question(one)) for one in both),
        influence,
        columns={REMOVAL: -influence / (sizes[0] - 1)},
        checks=tuple(check for one in both for check in _checks(one)),
        settings={
            "effects": [one.to_dict() for one in effects],
            "paths": [one.to_dict() for one in along],
            "edges": edges,
            "tau": sought[0].tau if sought else None,
            "flow": posterior is not None and posterior.copies is not None,
        },
        notes=tuple(notes),
        title="Causal effects",
        headline=f"{len(both)} estimate{'s' if len(both) > 1 else ''} · {sizes[0]:,} rows",
        legend=LEGEND,
    )


def _question(one: Effect | PathEffect) -> str:
    if isinstance(one, PathEffect):
        return f"Does the row raise the effect along {one.name}?"
    return f"Does the row raise the estimate of how much higher {one.outcome} is with {one.treatment}?"


def _checks(one: Effect | PathEffect) -> list[Check]:
    """Positivity; a path by a linear model has none."""
    if isinstance(one, PathEffect):
        size, imbalance = one.effective_size, one.imbalance
        if not math.isfinite(size):
            return []
    else:
        size, imbalance = one.positivity.smallest, max(one.positivity.imbalance.values())
    return [
        Check(
            f"{one.name}: effective sample size", size, f"{SMALLEST_SAMPLE} or more", size >= SMALLEST_SAMPLE, REMEDY
        ),
        Check(
            f"{one.name}: imbalance",
            imbalance,
            f"{LARGEST_IMBALANCE} sd or less",
            imbalance <= LARGEST_IMBALANCE,
            REMEDY,
        ),
    ]


def holds_effects(found: Attribution) -> bool:
    """Whether an attribution is one by :func:`attribution`, with all that it holds."""
    try:
        return bool(Effects(found).names)
    except InfluenceError:
        return False


def effects_of(found: Attribution | None) -> Effects:
    """The effects that a report's attribution holds.

    Raises:
        InfluenceError: If there is none.
    """
    if found is None:
        raise InfluenceError(
            f"{WHO}: no effects here; train with methods=[FINE(), CausalEffects(...)], or add estimates by "
            "report.with_effects(estimate(...))."
        )
    return Effects(found)


class Effects:
    """The effects that a report holds; ``print`` shows them, with what they rest on.

    Args:
        attribution: What a report holds.

    Attributes:
        rows: Dataset index of each row [n].
        found: The effects, as :func:`estimate` gave them.
        paths: Effects along paths, most stable first.
        edges: Probability of each edge under the tiers, where paths were asked for.
        tau: Smallest stability of a path, where they were.
        flow: Whether these probabilities are a flow's.

    Raises:
        InfluenceError: If the attribution holds no effects, or is damaged.

    Example:
        >>> from ine_callback.effects import ATE, EffectData, Outcome, estimate
        >>> from ine_callback.report import example_report
        >>> report, rng = example_report(600), np.random.default_rng(0)
        >>> kept = np.flatnonzero(np.isfinite(report.scores.mean_loss))  # one row was never observed
        >>> loss = Outcome("loss", report.scores.mean_loss[kept])
        >>> web = rng.integers(0, 2, len(kept))
        >>> found = estimate(EffectData({"web": web}, "web", loss, "web -> loss"), ATE(), "linear")
        >>> effects = report.with_effects(found, rows=kept).effects
        >>> effects.names, effects["ATE of web on loss"].estimate == found.estimate
        (('ATE of web on loss',), True)
    """

    def __init__(self, attribution: Attribution) -> None:
        if attribution.method != NAME or any(query.kind != KIND for query in attribution.queries):
            raise InfluenceError(f"{WHO}: the attribution by {attribution.method!r} holds no effects.")
        words, phi = attribution.settings, attribution.scores
        try:
            count = len(words["effects"])
            self.found = tuple(Effect.from_dict(one, phi[:, k]) for k, one in enumerate(words["effects"]))
            self.paths = tuple(PathEffect.from_dict(one, phi[:, count + k]) for k, one in enumerate(words["paths"]))
            self.edges = {(str(u), str(v)): float(chance) for u, v, chance in words["edges"]}
            self.tau = None if words["tau"] is None else float(words["tau"])
            self.flow = bool(words["flow"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InfluenceError(
                f"{WHO}: the effects in this report are damaged ({error}); estimate them anew."
            ) from None
        self.attribution, self.rows = attribution, attribution.rows
        if self.names != tuple(query.name for query in attribution.queries):
            raise InfluenceError(f"{WHO}: the effects in this report are damaged (names differ); estimate them anew.")

    @property
    def names(self) -> tuple[str, ...]:
        """Of effects and of paths."""
        return tuple(one.name for one in self._both)

    @property
    def _both(self) -> list[Effect | PathEffect]:
        return [*self.found, *self.paths]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as plain types for JSON."""
        words: dict[str, Any] = jsonable(self.attribution.settings, WHO)
        return words

    def __getitem__(self, name: str) -> Effect | PathEffect:
        for one in self._both:
            if one.name == name:
                return one
        raise KeyError(f"{WHO}: no {name!r}; choose one of {', '.join(map(repr, self.names))}")

    def __len__(self) -> int:
        return len(self.names)

    def __rich__(self) -> Group:
        from rich.console import Group

        parts: list[Any] = [render(self.found, self.rows)] if self.found else []
        parts += [render_paths(self.paths, self.tau or 0.0, self.flow)] if self.edges else []
        return Group(*parts)

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return f"Effects({', '.join(map(repr, self.names))}; {len(self.rows):,} rows)"


def compared(one: Effects, other: Effects) -> list[str]:
    """How estimates of the same question differ between two runs, in words.

    The rows are the same, so the standard error of the difference is that of the difference of their influence.
    """
    lines = []
    _, here, there = np.intersect1d(one.rows, other.rows, return_indices=True)
    for name in [name for name in one.names if name in other.names]:
        first, second = one[name], other[name]
        values = [each.effect if isinstance(each, PathEffect) else each.estimate for each in (first, second)]
        difference = first.influence[here] - second.influence[there]
        words = f"{name}: {_pm(values[0], first.standard_error)} and {_pm(values[1], second.standard_error)}"
        if len(here) == len(one.rows) == len(other.rows):
            error = math.sqrt(float((difference**2).sum())) / len(here)
            words += f"; difference {_pm(values[0] - values[1], error)}, on the same rows"
        lines.append(f"{words}.")
    return lines


def _pm(value: float, error: float) -> str:
    return f"{signed(value, 3)} ± {error:.2g}"
