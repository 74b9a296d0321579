"""One recorded training: what ine_callback says."""

from __future__ import annotations

import torch
from rich.progress import track

from benchmarks.lds.problems import Problem
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses, cross_entropy
from ine_callback import Recorder
from ine_callback.queries import MarginQuery, Query


def scores(problem: Problem, seed: int, discount: bool = True) -> Floats:
    """Scores [2, N, Q] of the loss and the margin queries, with the package's defaults: positive lowers the query."""
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = problem.optimizer(model.parameters())
    queries: dict[str, Query] = {
        "loss": RowLosses(problem.xq, problem.yq),
        "margin": MarginQuery((problem.xq, problem.yq), per_row=True),
    }
    steps = problem.steps_per_epoch
    recorder = Recorder(
        *(model, optimizer, len(problem.x), queries, cross_entropy),
        total_steps=problem.epochs * steps,
        discount=discount,
        on_error="raise",
    )
    with recorder:
        for _ in track(range(problem.epochs), description=f"{problem.name}: recorded, seed {seed}"):
            for rows in torch.randperm(len(problem.x)).split(problem.batch)[:steps]:
                batch = (problem.x[rows], problem.y[rows])
                with recorder.batch(rows, batch):
                    cross_entropy(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    found: Floats = recorder.report().scores.mu.reshape(len(problem.x), 2, -1).transpose(1, 0, 2)
    return found
