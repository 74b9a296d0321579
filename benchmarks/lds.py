"""Long training (protocol G2): which half of the rows a model saw, predicted from one run's scores.

    python -m benchmarks.lds --json lds.json --data DIR --truth truth-lds.pt

5,000 MNIST digits, MLP 784-128-64-10, SGD .01 with momentum .9, batches of 64, 50 epochs: the training loss is near 0
at the end and queries saturate. 60 random halves of the rows are retrained four times each. The linear data-modelling
score (LDS) of a query is Spearman's correlation over the halves between its mean outcome and minus the sum of the rows'
scores; 50 queries are posed twice, as their loss and as their negated margin. Without data: scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, track
from torch import Tensor, nn

from benchmarks.data import digits, folder
from benchmarks.fidelity import RowLosses, cross_entropy, machine
from benchmarks.metrics import Floats, per_query_spearman
from ine_callback import Recorder
from ine_callback.queries import MarginQuery, Query, margins

HIDDEN, QUERIES, BATCH, LR, MOMENTUM, SUBSETS, TOGETHER = (128, 64), 50, 64, 0.01, 0.9, 60, 10


@dataclass(frozen=True)
class Problem:
    """Rows and queries, the random halves of the rows [subsets, N / 2], and how long to train."""

    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor
    subsets: Tensor
    epochs: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of the network's layers."""
        return (self.x.shape[1], *HIDDEN, 10)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch on all rows."""
        return len(self.x) // BATCH


def load(path: Path | None, epochs: int) -> Problem:
    """The fixed problem; every random choice is seeded."""
    x, y = digits(path)
    x = (x - 0.1307) / 0.3081
    n = min(5000, len(x) * 2 // 3)
    g = torch.Generator().manual_seed(11)
    order = torch.randperm(len(x), generator=g)
    subsets = torch.stack([torch.randperm(n, generator=g)[: n // 2] for _ in range(SUBSETS)])
    rows, queries = order[:n], order[n : n + QUERIES]
    return Problem(x[rows], y[rows], x[queries], y[queries], subsets, epochs)


def initial(runs: int, sizes: Sequence[int], g: torch.Generator) -> list[Tensor]:
    """Weight [runs, out, in] and bias [runs, out] of every layer, as nn.Linear starts: uniform within 1/sqrt(in)."""
    out = []
    for inputs, outputs in pairwise(sizes):
        both = (torch.rand(runs, outputs, inputs + 1, generator=g) * 2 - 1) / math.sqrt(inputs)
        out += [both[..., :-1].contiguous(), both[..., -1].contiguous()]
    return out


def logits(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs [runs, n, 10] of all runs."""
    for k in range(0, len(parameters), 2):
        x = (x.relu() if k else x) @ parameters[k].mT + parameters[k + 1][:, None]
    return x


def retrain(keep: Tensor, seed: int, problem: Problem) -> tuple[Tensor, Tensor]:
    """Query losses and margins [runs, Q] of networks trained on the rows keep [runs, n], all at once."""
    g, (runs, n) = torch.Generator().manual_seed(seed), keep.shape
    parameters = [p.requires_grad_() for p in initial(runs, problem.sizes, g)]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
    for _ in range(problem.epochs):
        order = torch.argsort(torch.rand(runs, n, generator=g), 1)
        for start in range(0, n - BATCH + 1, BATCH):
            rows = keep.gather(1, order[:, start : start + BATCH])
            out = logits(parameters, problem.x[rows])
            optimizer.zero_grad()
            (F.cross_entropy(out.flatten(0, 1), problem.y[rows].flatten(), reduction="sum") / BATCH).backward()
            optimizer.step()
    with torch.no_grad():
        out = logits(parameters, problem.xq.expand(runs, -1, -1)).double()
        margin = margins(out.flatten(0, 1), problem.yq.repeat(runs)).view(runs, -1)
    return F.softplus(-margin), margin


def truth(problem: Problem, runs: int, file: Path | None) -> tuple[Tensor, Tensor]:
    """Losses and margins [subsets, runs, Q], from ``file`` if it is there, else computed and kept there.

    Raises:
        SystemExit: If the file holds a truth of another shape.
    """
    if file is not None and file.is_file():
        loss, margin = torch.load(file)
        if loss.shape[::2] != (SUBSETS, QUERIES):
            raise SystemExit(f"{file} holds a truth of shape {tuple(loss.shape)}, not ({SUBSETS}, runs, {QUERIES})")
        return loss, margin
    found = []
    for first in track(range(0, SUBSETS, TOGETHER), description=f"truth of {SUBSETS} halves x {runs} runs"):
        keep = problem.subsets[first : first + TOGETHER].repeat_interleave(runs, 0)
        found.append([v.view(TOGETHER, runs, QUERIES) for v in retrain(keep, 100 + first, problem)])
    both = [torch.cat(v) for v in zip(*found, strict=True)]
    if file is not None:
        torch.save(both, file)
    return both[0], both[1]


def estimate(seed: int, problem: Problem, discount: bool, refresh_every: int) -> tuple[Floats, float]:
    """Scores [N, 2 Q] (loss queries, then margin queries) of one recorded run, and its CPU seconds."""
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(problem.sizes):
        layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
    model = nn.Sequential(*layers[1:])
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), initial(1, problem.sizes, g), strict=True):
            parameter.copy_(start[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    queries: dict[str, Query] = {
        "loss": RowLosses(problem.xq, problem.yq),
        "margin": MarginQuery((problem.xq, problem.yq), per_row=True),
    }
    recorder = Recorder(
        model,
        optimizer,
        rows=len(problem.x),
        queries=queries,
        loss=cross_entropy,
        total_steps=problem.epochs * problem.steps_per_epoch,
        refresh_every=refresh_every,
        discount=discount,
        on_error="raise",
    )
    started = time.process_time()
    with recorder, Progress() as progress:
        bar = progress.add_task(f"seed {seed}, discount {'on' if discount else 'off'}", total=problem.epochs)
        for _ in range(problem.epochs):
            order = torch.argsort(torch.rand(1, len(problem.x), generator=g), 1)[0]
            for step in range(problem.steps_per_epoch):
                rows = order[step * BATCH : (step + 1) * BATCH]
                batch = (problem.x[rows], problem.y[rows])
                with recorder.batch(rows, batch):
                    cross_entropy(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            progress.advance(bar)
    return recorder.report().scores.mu, time.process_time() - started


def lds(mu: Floats, target: Floats, subsets: Tensor) -> float:
    """Mean over queries of Spearman over the halves; a positive score lowers the target [subsets, Q] when kept."""
    predicted = -np.stack([mu[subset.numpy()].sum(0) for subset in subsets])
    return per_query_spearman(predicted, target)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else scikit-learn's digits")
    parser.add_argument("--truth", type=Path, help="file that keeps the truth")
    parser.add_argument("--runs", type=int, default=4, help="trainings a half for the truth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="seeds of the one-run estimates")
    parser.add_argument("--refresh", type=int, nargs="+", default=[20], help="steps between refreshes")
    parser.add_argument("--quick", action="store_true", help="5 epochs, one seed, no kept truth: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = folder(args.data)
    problem = load(where, 5 if args.quick else 50)
    loss, margin = truth(problem, 2 if args.quick else args.runs, None if args.quick else args.truth)
    seeds = args.seeds[:1] if args.quick else args.seeds
    half = loss.shape[1] // 2
    targets = {"loss": loss.numpy(), "margin": -margin.numpy()}
    results: dict[str, Any] = {
        "protocol": "g2",
        "data": "scikit-learn digits" if where is None else "10,000 MNIST digits",
        "machine": machine(),
        "epochs": problem.epochs,
        "seeds": seeds,
        "split_half": {k: per_query_spearman(v[:, :half].mean(1), v[:, half:].mean(1)) for k, v in targets.items()},
        "rows": {},
    }
    print(results["split_half"])
    for discount, refresh in [*((True, r) for r in args.refresh), (False, args.refresh[0])]:
        name = f"discount {'on' if discount else 'off'}, refresh every {refresh} steps"
        runs = [estimate(seed, problem, discount, refresh) for seed in (seeds if discount else seeds[:2])]
        both = {"loss": slice(0, QUERIES), "margin": slice(QUERIES, 2 * QUERIES)}
        found: dict[str, Any] = {"seconds": float(np.median([s for _, s in runs]))}
        for query, columns in both.items():
            target = targets[query].mean(1)
            found[query] = [lds(mu[:, columns], target, problem.subsets) for mu, _ in runs]
            found[f"{query}, mean of runs"] = lds(
                np.mean([mu for mu, _ in runs], 0)[:, columns], target, problem.subsets
            )
        found["margin scores, loss target"] = [
            lds(mu[:, both["margin"]], targets["loss"].mean(1), problem.subsets) for mu, _ in runs
        ]
        results["rows"][name] = found
        args.json.write_text(json.dumps(results, indent=1))
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
