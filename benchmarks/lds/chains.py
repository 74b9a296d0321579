"""BIF around one trained network: what the package's chains say with their default settings, and their Laplace term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from benchmarks.lds.problems import Problem, row_losses
from benchmarks.lds.recorded import lowered
from benchmarks.lds.retrain import Stacked
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses
from ine_callback.methods.bif.bif import BIF
from ine_callback.methods.bif.evaluation import EachRow
from ine_callback.methods.bif.run import bif_scores
from ine_callback.queries import MarginQuery, Query

NAMES = ("ine_callback BIF", "ine_callback BIF, Laplace term")


@dataclass(frozen=True)
class Chains:
    """Both estimates [2, N, Q] of one run, in the order of ``NAMES``, and what the run says about itself."""

    estimates: tuple[Floats, Floats]
    verdict: dict[str, Any]


def of_rows(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return row_losses(module(batch[0]), batch[1])


def scores(problem: Problem, stacked: Stacked, bif: BIF) -> Chains:
    """One run of the chains around the first of the stacked networks, all rows scored: positive lowers the query."""
    model = problem.network()
    model.load_state_dict({k: v[0] for k, v in stacked.items()})
    asked = (problem.xq, problem.yq)
    margin: Query = RowLosses(*asked, lowered) if asked[1].is_floating_point() else MarginQuery(asked, per_row=True)
    queries = {"loss": EachRow(asked), "margin": margin}
    everything = replace(bif, rows=len(problem.x))
    found = bif_scores(model.eval(), (problem.x, problem.y), queries, everything, of_rows, progress=False)
    return Chains(
        (by_kind(found.scores), by_kind(found.laplace)),
        {
            "reliable": found.reliable,
            "reasons": found.reasons,
            "checks": {check.name: check.value for check in found.checks},
            "settings": found.settings,
        },
    )


def by_kind(estimate: Floats) -> Floats:
    """[2, N, Q] from [N, 2 Q]."""
    found: Floats = estimate.reshape(len(estimate), 2, -1).transpose(1, 0, 2)
    return found
