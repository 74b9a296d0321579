"""One recorded training: what ine_callback says."""

from __future__ import annotations

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.lds.problems import Problem, row_losses, row_margins
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses
from benchmarks.recorded import recorded_step
from ine_callback import Recorder
from ine_callback.queries import MarginQuery, Query

Batch = tuple[Tensor, Tensor]


def loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a batch."""
    return row_losses(module(batch[0]), batch[1]).mean()


def lowered(module: nn.Module, batch: Batch) -> Tensor:
    """The negated margin, which for numbers is the prediction."""
    return -row_margins(module(batch[0]), batch[1]).mean()


def scores(problem: Problem, seed: int, discount: bool = True) -> Floats:
    """Scores [2, N, Q] of the loss and the margin queries, with the package's defaults: positive lowers the query."""
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = problem.optimizer(model.parameters())
    number, held_out = problem.yq.is_floating_point(), (problem.xq, problem.yq)
    queries: dict[str, Query] = {
        "loss": RowLosses(*held_out, loss),
        "margin": RowLosses(*held_out, lowered) if number else MarginQuery(held_out, per_row=True),
    }
    steps = problem.steps_per_epoch
    recorder = Recorder(
        *(model, optimizer, len(problem.x), queries, loss),
        total_steps=problem.epochs * steps,
        discount=discount,
        on_error="raise",
    )
    with recorder:
        for _ in track(range(problem.epochs), description=f"{problem.name}: recorded, seed {seed}"):
            for rows in torch.randperm(len(problem.x)).split(problem.batch)[:steps]:
                batch = (problem.x[rows], problem.y[rows])
                recorded_step(recorder, model, optimizer, loss, rows, batch)
    found: Floats = recorder.report().scores.mu.reshape(len(problem.x), 2, -1).transpose(1, 0, 2)
    return found
