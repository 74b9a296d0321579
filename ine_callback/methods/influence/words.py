"""What IF found, in the form of the report: scores, checks of them, and words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ine_callback.methods.context import FitContext
from ine_callback.methods.influence.fisher import Fisher
from ine_callback.methods.influence.row_scores import RowScores
from ine_callback.methods.influence.settings import ITERATIVE, IFSettings, settings_name
from ine_callback.methods.influence.solvers.base import Solution, System
from ine_callback.scores import Attribution, Check, LayerScores, QueryInfo, TokenScores

HIGH_LEVERAGE = 0.95
MAX_RESIDUAL = {"exact": 1e-3, "cg": 1e-2, "pcg": 1e-2, "astra": 0.2, "lissa": 0.2}
MIN_COVERAGE = 0.9
MAX_TOKEN_ERROR = 0.01
MAX_GRADIENT = 0.5  # of the rows' gradients, that do not cancel in their mean
LEGEND = (
    "score: to first order, by how much the query rises when the model is trained without the row; above 0: training "
    "on the row helps. 1/N <query gradient, (F + damping)^-1 row gradient> at the trained weights."
)
TITLES = {
    "ekfac": "EK-FAC",
    "kfac": "K-FAC",
    "diagonal": "the Fisher's diagonal",
    "identity": "no curvature (gradient dot products)",
    "exact": "the exact Fisher",
    "cg": "conjugate gradients",
    "pcg": "conjugate gradients preconditioned by EK-FAC",
    "astra": "ASTRA",
    "lissa": "LiSSA",
    "datainf": "DataInf",
}


def attribution(
    settings: IFSettings,
    fisher: Fisher,
    context: FitContext,
    queries: tuple[QueryInfo, ...],
    system: System,
    solution: Solution,
    scores: RowScores,
    steps: Mapping[str, Tensor],
) -> Attribution:
    """Scores with their checks; ``steps`` has the groups' Newton steps in the queries [Q]."""
    damping = {b.name: float(d.flatten()[0]) for b, d in system.space.split(system.damping[None]).items()}
    names, tokens = tuple(block.name for block in system.space.blocks), scores.tokens()
    arrays = {
        "residual": solution.residual.double().cpu().numpy(),
        "damping": np.array(list(damping.values())),
    }
    if np.isfinite(scores.leverages).any():
        arrays["leverage"] = scores.leverages
    if scores.labels is not None:
        arrays["token labels"] = scores.labels
    arrays |= {f"newton {name}": step.cpu().numpy() for name, step in steps.items()}
    return Attribution(
        method=settings_name(settings),
        rows=scores.rows,
        queries=queries,
        scores=scores.by_layer.sum(1),
        layers=LayerScores(names, scores.by_layer) if settings.per_layer else None,
        tokens=tokens,
        checks=(*_checks(settings, solution, scores), *_coverage(settings, context, system), *_tokens(scores, tokens)),
        settings=settings.settings() | {"fisher": fisher, "damping_used": damping, "parameters": system.space.size},
        arrays=arrays,
        notes=tuple(_notes(settings, solution, scores)),
        title=f"{'Rescaled influence' if settings.rescale else 'Influence'} functions by {TITLES[settings.solver]}",
        headline=(
            f"{system.space.size:,} parameters in {len(names)} blocks, {fisher} Fisher of {context.rows:,} rows, "
            f"damping {min(damping.values()):.3g} to {max(damping.values()):.3g}, {solution.iterations} iterations"
        ),
        legend=LEGEND,
    )


def _checks(settings: IFSettings, solution: Solution, scores: RowScores) -> list[Check]:
    checks = []
    if settings.solver in MAX_RESIDUAL:
        limit, worst = MAX_RESIDUAL[settings.solver], float(solution.residual.max())
        remedy = "raise iterations or damping" if settings.solver in ITERATIVE else "raise damping"
        checks.append(Check("largest relative residual of a query", worst, f"below {limit:g}", worst < limit, remedy))
    whole = float(scores.squares) ** 0.5 * max(1, len(scores.rows)) ** 0.5
    share = float(scores.gradient.norm()) / whole if whole > 0 else 0.0
    remedy = "train until the loss no longer falls, or trust f-INE, which knows the steps that were taken"
    checks.append(
        Check("mean gradient over a row's", share, f"below {MAX_GRADIENT:g}", bool(share < MAX_GRADIENT), remedy)
    )
    if settings.rescale:
        high = float(np.mean(scores.leverages > HIGH_LEVERAGE))
        remedy = "raise damping: these rows' own scores are hardly determined"
        checks.append(Check(f"rows with a leverage above {HIGH_LEVERAGE:g}", high, "below 0.01", high < 0.01, remedy))
    return checks


def _coverage(settings: IFSettings, context: FitContext, system: System) -> list[Check]:
    """How much of the model is scored, where nobody asked for a part of it."""
    if settings.layers is not None or context.layers is not None:
        return []
    trainable = sum(p.numel() for p in context.module.parameters() if p.requires_grad)
    share = system.space.size / max(1, trainable)
    remedy = "register the layers that the notes name with @register_layer"
    return [Check("captured share of the parameters", share, f"above {MIN_COVERAGE:g}", share > MIN_COVERAGE, remedy)]


def _tokens(scores: RowScores, found: TokenScores | None) -> list[Check]:
    """Whether a row's tokens add up to its score, where they come from a pass of their own."""
    if found is None or scores.labels is None:
        return []
    whole = scores.by_layer.sum(1)
    sums = np.stack([found.of(k).sum(0) for k in range(len(whole))])
    error = float(np.linalg.norm(sums - whole) / max(float(np.linalg.norm(whole)), 1e-300))
    remedy = (
        "its operations have no forward mode of differentiation, or the loss has other terms; take parts by position"
    )
    return [
        Check("tokens' sums against rows' scores", error, f"below {MAX_TOKEN_ERROR:g}", error < MAX_TOKEN_ERROR, remedy)
    ]


def _notes(settings: IFSettings, solution: Solution, scores: RowScores) -> list[str]:
    notes = []
    if not solution.exact and settings.solver != "identity":
        error = float(torch.as_tensor(solution.residual).median())
        notes.append(f"{settings.solver} is an approximate inverse: its median relative residual is {error:.2f}")
    if solution.largest is not None:
        notes.append(f"largest eigenvalue of the operator on minibatches: {solution.largest:.3g}")
    if settings.rescale and settings.solver in ITERATIVE:
        notes.append("leverages are by EK-FAC, solutions by the solver")
    return notes
