"""IF at work: curvature, solutions, and one pass over the rows that turns them into scores."""

from __future__ import annotations

from ine_callback.capture.label_gradients import MAX_CLASSES
from ine_callback.errors import InfluenceError
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import Steps
from ine_callback.methods.influence.curvature import Curvature
from ine_callback.methods.influence.fisher import Fisher
from ine_callback.methods.influence.newton import newton_step
from ine_callback.methods.influence.rif import MAX_APPROXIMATE, MAX_LEVERAGE, all_labels, label_weights
from ine_callback.methods.influence.row_scores import RowScores
from ine_callback.methods.influence.sampling import sampler_of
from ine_callback.methods.influence.settings import STOCHASTIC, IFSettings
from ine_callback.methods.influence.solvers import solve
from ine_callback.methods.influence.solvers.exact import inverse_of
from ine_callback.methods.influence.words import attribution
from ine_callback.methods.passes import PerSamplePass

FEW_LABELS = 20  # of so many, all are gone through


def scored(settings: IFSettings, context: FitContext) -> Steps:
    """Scores rows at the present weights: see :class:`.IF`."""
    labels = context.labels()
    all_needed = settings.rescale is not None or bool(settings.groups)
    if all_needed and labels is None:
        raise InfluenceError(
            f"IF: rescale='rif' and groups go through all labels of a row, at most {MAX_CLASSES}, which this loss has "
            "no list of; leave them out."
        )
    fisher = settings.fisher or _default(labels, all_needed)
    curvature = Curvature(context, settings, fisher)
    yield from curvature.passes()
    system = curvature.system()
    system.batch_size, system.seed, system.progress = settings.batch_size, settings.seed, context.progress
    if settings.solver in STOCHASTIC:
        system.sampler = yield from sampler_of(settings, context, system.fisher)
    v = system.space.join(context.query_gradients()).detach().to(system.damping)
    solution = solve(system, v, settings)
    rows = range(context.rows) if settings.rows is None else settings.rows
    scores = RowScores(system.space, solution.x, rows, context.rows, settings.per_token)
    if settings.rescale is None:
        yield PerSamplePass(rows=settings.rows), scores.take
    if not all_needed:
        return attribution(settings, fisher, context, system, solution, scores, {})
    exact = settings.solver == "exact"
    inverse, most = (inverse_of(system), MAX_LEVERAGE) if exact else (system.precondition, MAX_APPROXIMATE)
    if settings.rescale is not None:
        for which, each, own in all_labels(context, rows, labels or 1, system.space.size):
            weights, leverages = label_weights(system.space, inverse, each, own, context.rows, most)
            scores.take_rescaled(which, each, own, weights, leverages)
    steps = {
        name: v.double() @ newton_step(context, system.space, inverse, list(group), labels or 1, most)
        for name, group in (settings.groups or {}).items()
    }
    return attribution(settings, fisher, context, system, solution, scores, steps)


def _default(labels: int | None, all_needed: bool) -> Fisher:
    return "exact" if all_needed or (labels is not None and labels <= FEW_LABELS) else "sampled"
