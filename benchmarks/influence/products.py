"""How near iterative solvers come to the solution, by the products with the Fisher that they take.

The network of the halves, at damping 1e-2. A product with the Fisher of all rows counts 1, one with a
minibatch of m rows m / N, whatever it is made for: steps, the largest eigenvalue, checks of the objective.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.influence.halves import BATCH, DECAY, MOMENTUM, RATE, SPREAD, Problem, problem
from benchmarks.influence.shared import context_of, mean_and_error, network, system_of
from benchmarks.network import cross_entropy
from ine_callback import IF
from ine_callback.methods.context import FitContext
from ine_callback.methods.influence.solvers import solve
from ine_callback.methods.influence.solvers.base import System, relative_error
from ine_callback.queries import MarginQuery

DAMPING = 1e-2
ITERATIONS = {"pcg": (5, 10, 20, 40), "cg": (5, 10, 20, 40), "astra": (50, 200), "lissa": (50, 200)}


class Counted(System):
    """Counts its products."""

    taken = 0.0

    def product(self, x: Tensor, rows: Tensor | None = None, weights: Tensor | None = None, draw: int = 0) -> Tensor:
        self.taken += 1.0 if rows is None else len(rows) / self.fisher.rows
        return super().product(x, rows, weights, draw)


def trained(p: Problem, seed: int) -> FitContext:
    """A network trained on all rows."""
    module = network(p.hidden, 10**6 + seed, SPREAD).float()
    optimizer = torch.optim.SGD(module.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(p.epochs):
        for rows in torch.randperm(len(p.y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(module, (p.x[rows], p.y[rows])).backward()
            optimizer.step()
    return context_of(module, cross_entropy, (p.x, p.y), {"margin": MarginQuery((p.xq, p.yq), per_row=True)})


def measured(quick: bool) -> dict[str, Any]:
    """Median relative error over the queries, products and seconds, mean over networks."""
    p, models = problem(quick), 2 if quick else 3
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    for seed in track(range(models), description="networks"):
        context = trained(p, seed)
        plain = system_of(context, IF("pcg", damping=DAMPING))
        v = plain.space.join(context.query_gradients()).detach()
        wanted = solve(plain, v, IF("exact", damping=DAMPING)).x
        for solver, counts in (*ITERATIONS.items(), ("ekfac", (1,)), ("exact", (1,))):
            for iterations in counts[:1] if quick else counts:
                system = Counted(
                    plain.space, plain.fisher, plain.damping, plain.precondition, min(256, len(p.y)), seed=seed
                )
                method = IF(solver, damping=DAMPING, iterations=iterations, tol=1e-9)  # type: ignore[arg-type]
                started = time.process_time()
                solution = solve(system, v, method)
                seconds, steps = time.process_time() - started, solution.iterations
                of_solver = rows.setdefault(solver, {}).setdefault(
                    str(steps), {"error": [], "products": [], "seconds": []}
                )
                of_solver["error"].append(float(relative_error(solution.x, wanted).median()))
                of_solver["products"].append(system.taken)
                of_solver["seconds"].append(seconds)
    found = {
        solver: {steps: {what: mean_and_error(each) for what, each in row.items()} for steps, row in by_steps.items()}
        for solver, by_steps in rows.items()
    }
    return {
        "rows": len(p.y),
        "queries": len(p.yq),
        "models": models,
        "damping": DAMPING,
        "solvers": found,
        "parameters": int(np.prod(wanted.shape[1:])),
    }
