"""Retraining many networks at once: their parameters are stacked, and torch's optimizers work element by element."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.lds.problems import Problem, row_losses, row_margins

Stacked = dict[str, Tensor]


def train(problem: Problem, keep: Tensor, seed: int, weight: Tensor | None = None) -> Iterator[Stacked]:
    """Trains one network on each of the rows keep [runs, n]; yields all parameters [runs, ...] after every epoch.

    Args:
        problem: What to train.
        keep: Rows of each run. A batch holds ``problem.batch`` of them; what fills none is left out.
        seed: Of initial weights, order of rows, and dropout.
        weight: Factor of each row's loss [runs, N], e.g. 0 for a row left out. Such trainings are paired: they share
            initial weights, order and dropout.
    """
    torch.manual_seed(seed)
    paired = weight is not None
    models = [problem.network()] * len(keep) if paired else [problem.network() for _ in keep]
    parameters = {k: v.detach().requires_grad_() for k, v in stack_module_state(models)[0].items()}
    skeleton = copy.deepcopy(models[0]).to("meta").train()
    forward = vmap(lambda p, x: functional_call(skeleton, p, (x,)), randomness="same" if paired else "different")
    optimizer, n = problem.optimizer(parameters.values()), keep.shape[1]
    for _ in range(problem.epochs):
        order = torch.argsort(torch.rand(1 if paired else len(keep), n), 1).expand(len(keep), -1)
        for start in range(0, n - problem.batch + 1, problem.batch):
            rows = keep.gather(1, order[:, start : start + problem.batch])
            logits = forward(parameters, problem.x[rows])
            losses = row_losses(logits.flatten(0, 1), problem.y[rows].flatten(0, 1))
            if weight is not None:
                losses = losses * weight.gather(1, rows).flatten()
            optimizer.zero_grad()
            (losses.sum() / problem.batch).backward()
            optimizer.step()
        yield {k: v.detach().clone() for k, v in parameters.items()}


def last(states: Iterator[Stacked]) -> Stacked:
    """The parameters at the end of training."""
    for state in states:
        found = state
    return found


def outcomes(problem: Problem, parameters: Stacked) -> Tensor:
    """Query losses and negated margins, [2, runs, Q] in double: lower is better."""
    skeleton = problem.network().to("meta").eval()
    with torch.no_grad():
        logits = vmap(lambda p: functional_call(skeleton, p, (problem.xq,)))(parameters).double()
        runs, labels = len(logits), problem.yq.repeat(len(logits), *[1] * (problem.yq.dim() - 1))
        flat = logits.flatten(0, 1)
        return torch.stack([row_losses(flat, labels), -row_margins(flat, labels)]).view(2, runs, -1)


def halves(problem: Problem, runs: int, file: Path | None, together: int = 10) -> Tensor:
    """Outcomes of ``runs`` trainings on each half of the rows, [2, subsets, runs, Q]; kept in ``file`` if given.

    Raises:
        SystemExit: If the file holds a truth of another shape.
    """
    shape = (2, len(problem.subsets), runs, len(problem.xq))
    if file is not None and file.is_file():
        kept: Tensor = torch.load(file)
        if kept.shape != shape:
            raise SystemExit(f"{file} holds a truth of shape {tuple(kept.shape)}, not {shape}; name another --truth")
        return kept
    found = []
    for first in track(range(0, shape[1], together), description=f"{problem.name}: {shape[1]} halves x {runs} runs"):
        keep = problem.subsets[first : first + together].repeat_interleave(runs, 0)
        found.append(outcomes(problem, last(train(problem, keep, 100 + first))).view(2, -1, runs, shape[3]))
    both = torch.cat(found, 1)
    if file is not None:
        torch.save(both, file)
    return both


def left_out(problem: Problem, rows: Tensor, runs: int) -> Tensor:
    """How each outcome changes when one of ``rows`` is left out, [2, rows, runs, Q].

    The training without a row and the one with it share initial weights, order and dropout; its loss counts as 0.
    """
    n, found = len(problem.x), []
    for seed in track(range(runs), description=f"{problem.name}: {len(rows)} rows left out x {runs} runs"):
        one = torch.ones(len(rows) + 1, n)
        one[torch.arange(len(rows)), rows] = 0
        keep = torch.arange(n).expand(len(one), -1)
        out = outcomes(problem, last(train(problem, keep, 5000 + seed, one)))
        found.append(out[:, :-1] - out[:, -1:])
    return torch.stack(found, 2)
