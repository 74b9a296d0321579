"""The true influence of a protocol's groups of rows, by retraining all runs of a group as one network.

The parameters of the runs are stacked; ``vmap`` over ``functional_call`` trains any module so. torch's optimizers work
element by element, so each run is trained as it would be alone (tests/test_family.py).

A training without a group and the one on all rows share the initial weights and, as far as they can, the order: the
places of the group's rows are taken by the last rows of the epoch. The order of the remaining rows is then as random as
any, and differences between the two trainings are known much better than from separate ones. A single row left out
keeps its place, and its loss counts as 0 there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.family.networks import build, make_optimizer
from benchmarks.family.protocols import Protocol
from benchmarks.family.tasks import QUERIES, Task, row_losses
from benchmarks.g1 import true_mu
from benchmarks.metrics import Floats, per_query_spearman

SEED = 5000  # of the retrainings; recorded runs have seeds below


@dataclass(frozen=True)
class Truth:
    """What the retrainings found.

    Attributes:
        losses: By group size: losses [groups, runs, Q + 8] of the queries and of the single rows, without the group.
        base: The same with all rows [runs, Q + 8].
        seconds: CPU seconds that the retrainings took.
    """

    losses: dict[str, Tensor]
    base: Tensor
    seconds: float

    def shift(self, size: str) -> Floats:
        """Raw shift [groups, Q + 8] of the mean loss; above 0: training on the group lowers it (helpful)."""
        return (self.losses[size].mean(1) - self.base.mean(0)).double().numpy()

    def mu(self, size: str, part: slice = slice(None)) -> Floats:
        """The shift in standard deviations over retrainings [groups, Q + 8], from some of the runs."""
        found = torch.stack([true_mu(self.base[part], without[part]) for without in self.losses[size]])
        return found.double().numpy()

    def mean_mu(self, size: str) -> Floats:
        """The same for the mean loss of the held-out queries [groups, 1]."""
        base, found = (a[..., :QUERIES].mean(-1, keepdim=True) for a in (self.base, self.losses[size]))
        return torch.stack([true_mu(base, without) for without in found]).double().numpy()

    @property
    def sd(self) -> Floats:
        """Standard deviation of each loss over retrainings [Q + 8]."""
        return self.base.double().std(0).numpy()

    def reliability(self, size: str) -> dict[str, float]:
        """How well the truth's ranking of groups is known: 1 without noise, by a variance and by two halves.

        The noise of a ranking is that of a group's paired difference around the mean difference of all groups.
        """
        change = (self.losses[size] - self.base)[..., :QUERIES].double()
        error = ((change - change.mean(0)).var(1) / change.shape[1]).mean(0).numpy()
        signal = change.mean(1).var(0).numpy()
        halves = (self.mu(size, slice(h, None, 2))[:, :QUERIES] for h in (0, 1))
        half = per_query_spearman(*halves)
        return {
            "reliability": float(np.mean(1 - np.minimum(1, error / np.maximum(signal, 1e-30)))),
            "split_half_reliability": 2 * half / (1 + half),
        }


def orders(rows: int, runs: int, epochs: int, left_out: Tensor | None, g: torch.Generator) -> Iterator[Tensor]:
    """Each epoch's order [runs, rows left]; rows left out are replaced by the last ones of the epoch."""
    for _ in range(epochs):
        order = torch.rand(runs, rows, generator=g).argsort(1)
        if left_out is not None:
            mask = torch.zeros(rows, dtype=torch.bool)
            mask[left_out] = True
            kept, spare = order[:, : rows - len(left_out)].clone(), order[:, rows - len(left_out) :]
            kept[mask[kept]] = spare[~mask[spare]]  # as many in each run
            order = kept
        yield order


def retrain(
    protocol: Protocol,
    task: Task,
    runs: int,
    seed: int,
    left_out: Tensor | None = None,
    muted: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Losses [runs, Q + 8] of the queries and the single rows after training ``runs`` networks at once.

    Args:
        protocol: How to train.
        task: Its rows and queries.
        runs: Networks.
        seed: Of initial weights and order.
        left_out: Rows that are not trained on.
        muted: A row whose loss counts as 0; all else stays as in the training with it.
        dtype: Of the parameters and inputs.
    """
    modules = [build(protocol, seed + k).to(dtype) for k in range(runs)]
    parameters, buffers = stack_module_state(modules)
    kept = protocol.rows - (0 if left_out is None else len(left_out))
    steps = protocol.epochs * -(-kept // protocol.batch)
    optimizer, scheduler = make_optimizer(protocol, parameters.values(), steps)

    def outputs(own: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(modules[0], (own, buffers), (x,))
        return found

    def losses(x: Tensor, y: Tensor, shared: bool = False) -> Tensor:
        out = vmap(outputs, in_dims=(0, None if shared else 0))(parameters, x).flatten(0, 1)
        return row_losses(out, y.repeat(runs, *[1] * (y.dim() - 1)) if shared else y.flatten(0, 1)).view(runs, -1)

    inputs, targets = (v.to(dtype) if v.is_floating_point() else v for v in (task.x, task.y))
    g = torch.Generator().manual_seed(seed)
    for order in orders(protocol.rows, runs, protocol.epochs, left_out, g):
        for rows in order.split(protocol.batch, 1):
            found = losses(inputs[rows], targets[rows])
            if muted is not None:
                found = found * (rows != muted)
            optimizer.zero_grad()
            found.mean(1).sum().backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    asked = [torch.cat([q, own[task.singles]]) for q, own in ((task.xq, task.x), (task.yq, task.y))]
    x, y = (v.to(dtype) if v.is_floating_point() else v for v in asked)
    with torch.no_grad():
        return losses(x, y, shared=True)


def compute(protocol: Protocol, task: Task, runs: int) -> Truth:
    """Retrains on all rows and without each group."""
    started = time.process_time()
    base = retrain(protocol, task, runs, SEED)
    losses: dict[str, list[Tensor]] = {}
    every = [(size, group) for size, groups in task.groups.items() for group in groups]
    for size, group in track(every, description=f"truth, {protocol.name}, {runs} runs a group"):
        left_out, muted = (None, int(group)) if size == "single" else (group, None)
        losses.setdefault(size, []).append(retrain(protocol, task, runs, SEED, left_out, muted))
    return Truth({size: torch.stack(found) for size, found in losses.items()}, base, time.process_time() - started)


def load(protocol: Protocol, task: Task, runs: int, folder: Path | None) -> Truth:
    """The truth from its file if it is there, else computed and, with a folder, kept there.

    Raises:
        SystemExit: If the file holds the truth of another protocol, of other groups or of another shape.
    """
    file = None if folder is None else folder / f"{protocol.name}.pt"
    if file is None or not file.is_file():
        found = compute(protocol, task, runs)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"protocol": protocol.facts(), "groups": task.fingerprint, **vars(found)}, file)
        return found
    kept = torch.load(file)
    width = QUERIES + len(task.singles)
    fits = all(tuple(kept["losses"][s].shape[::2]) == (len(groups), width) for s, groups in task.groups.items())
    if not fits or kept["protocol"] != protocol.facts() or kept["groups"] != task.fingerprint:
        raise SystemExit(f"{file} holds another truth ({kept['protocol']}); name another folder with --truth")
    return Truth(kept["losses"], kept["base"], kept["seconds"])
