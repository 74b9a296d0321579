"""IF at work: curvature, solutions, and one pass over the rows that turns them into scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ine_callback.capture.label_gradients import MAX_CLASSES
from ine_callback.errors import InfluenceError
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import Steps
from ine_callback.methods.influence.curvature import Curvature
from ine_callback.methods.influence.directions import Directions
from ine_callback.methods.influence.fisher import MAX_BYTES, Fisher
from ine_callback.methods.influence.label_parts import label_parts
from ine_callback.methods.influence.newton import newton_step
from ine_callback.methods.influence.rif import MAX_APPROXIMATE, MAX_LEVERAGE, Inverse, all_labels, label_weights
from ine_callback.methods.influence.row_scores import RowScores
from ine_callback.methods.influence.sampling import sampler_of
from ine_callback.methods.influence.settings import STOCHASTIC, IFSettings
from ine_callback.methods.influence.solvers import solve
from ine_callback.methods.influence.solvers.base import System, together
from ine_callback.methods.influence.solvers.exact import inverse_of
from ine_callback.methods.influence.words import attribution
from ine_callback.methods.passes import PerSamplePass
from ine_callback.queries import BoundQuery

FEW_LABELS = 20  # of so many, all are gone through
HELD_VECTORS = 8  # as large as the parameters, that a solver holds for each query


def scored(settings: IFSettings, context: FitContext, queries: Sequence[BoundQuery] | None = None) -> Steps:
    """Scores rows at the present weights: see :class:`.IF`.

    Args:
        settings: IF's.
        context: The trained model.
        queries: In place of the run's.
    """
    queries = context.queries if queries is None else queries
    labels, fisher = _labels(settings, context)
    curvature = Curvature(context, settings, fisher)
    yield from curvature.passes()
    system = curvature.system()
    system.batch_size, system.seed, system.progress = settings.batch_size, settings.seed, context.progress
    if settings.solver in STOCHASTIC:
        system.sampler = yield from sampler_of(settings, context, system.fisher)
    steps = _newton_steps(settings, context, system, labels or 1)
    directions, solutions, effects = Directions(system.space, settings.query_rank), [], []
    for some in _chunks(settings, queries, system):
        v = system.space.join(context.query_gradients(some)).detach().to(system.damping)
        solution = solve(system, v, settings)
        directions.add(solution.x)
        solutions.append(replace(solution, x=solution.x[:, :0]))
        effects.append({name: v.double() @ step for name, step in steps.items()})
    rows = range(context.rows) if settings.rows is None else settings.rows
    scores = RowScores(directions, len(queries), rows, context.rows, settings.per_token in (True, "position"))
    if settings.rescale is None:
        yield PerSamplePass(rows=settings.rows), scores.take
    else:
        inverse, most = _inverse(settings, system)
        for which, each, own in all_labels(context, rows, labels or 1, system.space.size):
            weights, leverages = label_weights(system.space, inverse, each, own, context.rows, most)
            scores.take_rescaled(which, each, own, weights, leverages)
    if settings.per_token == "label":
        for row in label_parts(context, directions, settings.rows):
            scores.take_labels(row)
    newton = {name: torch.cat([each[name] for each in effects]) for name in steps}
    infos = tuple(query.info for query in queries)
    return attribution(settings, fisher, context, infos, system, together(solutions), scores, newton)


def weights_without(settings: IFSettings, context: FitContext) -> dict[str, dict[str, Tensor]]:
    """The parameters after the Newton step of each group of ``settings.groups``, by group and by name."""
    labels, fisher = _labels(settings, context)
    curvature = Curvature(context, settings, fisher)
    for asked, take in curvature.passes():
        for rows, gradients in context.per_sample(asked):
            take(rows, gradients)
    system, names = curvature.system(), {p: name for name, p in context.module.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for group, step in _newton_steps(settings, context, system, labels or 1).items():
        moved = found[group] = {name: p.detach().clone() for p, name in names.items()}
        for block, part in system.space.split(step[None]).items():
            for parameter, change in zip(block.parameters, block.from_layout(part[0]), strict=True):
                moved[names[parameter]] += change.to(parameter)
    return found


def _labels(settings: IFSettings, context: FitContext) -> tuple[int | None, Fisher]:
    """How many labels a row has, where they can be listed, and which Fisher to take; refuses what cannot be."""
    for what, listed in {"rows": settings.rows or (), **(settings.groups or {})}.items():
        if lost := [row for row in listed if not 0 <= row < context.rows]:
            raise InfluenceError(f"IF: {what!r} lists row {lost[0]}; there are rows 0 to {context.rows - 1}.")
    labels = context.labels()
    all_needed = settings.rescale is not None or bool(settings.groups)
    if all_needed and labels is None:
        raise InfluenceError(
            f"IF: rescale='rif' and groups go through all labels of a row, at most {MAX_CLASSES}, which this loss has "
            "no list of; leave them out."
        )
    few = labels is not None and labels <= FEW_LABELS
    return labels, settings.fisher or ("exact" if all_needed or few else "sampled")


def _inverse(settings: IFSettings, system: System) -> tuple[Inverse, float]:
    """``(F + D)^-1`` for leverages, by EK-FAC where there is no exact one; and the largest leverage to believe."""
    if settings.solver == "exact":
        return inverse_of(system), MAX_LEVERAGE
    return system.precondition, MAX_APPROXIMATE


def _newton_steps(settings: IFSettings, context: FitContext, system: System, labels: int) -> dict[str, Tensor]:
    """By how much the parameters move [P] when each group is left out."""
    if not settings.groups:
        return {}
    inverse, most = _inverse(settings, system)
    return {
        name: newton_step(context, system.space, inverse, list(group), labels, most)
        for name, group in settings.groups.items()
    }


def _chunks(settings: IFSettings, queries: Sequence[BoundQuery], system: System) -> Iterator[Sequence[BoundQuery]]:
    """Queries that are solved together: all, or as many as fit where little is kept of them."""
    count = len(queries)
    if settings.query_rank is not None:
        per_query = HELD_VECTORS * system.space.size * system.damping.element_size()
        count = max(1, min(count, MAX_BYTES // per_query))
    for start in range(0, len(queries), count):
        yield queries[start : start + count]
