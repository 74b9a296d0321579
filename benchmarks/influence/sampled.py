"""Rows that stand for all: how far off the solution is when the Fisher comes from m sampled rows, and what it removes.

A network 64-12-10 on 1,200 digits. ``x = (F + D)^-1 v`` with v the gradient of the mean loss's part of class 8; the
weights move by tau x, which is to unlearn the class. F1 joins what is unlearnt and what is kept on the held-out rows,

    F1 = 2 (1 - a) b / (1 - a + b),    a: accuracy on the class, b: on the rest

with tau chosen by the Fisher of all rows. Damping 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.influence.shared import context_of, driven, mean_and_error, network, shuffled_digits, system_of
from benchmarks.network import cross_entropy
from ine_callback import IF
from ine_callback.methods.influence.samplers import SamplerName
from ine_callback.methods.influence.sampling import sampler_of
from ine_callback.methods.influence.solvers.base import System, relative_error
from ine_callback.queries import CallableQuery

ROWS, HIDDEN, CLASS, DAMPING = 1200, 12, 8, 1e-2
SIZES = (50, 100, 200)
SCALES = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    model, generator = network(HIDDEN, 0, (1 / 8, 1 / 4)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model, (x[rows], y[rows])).backward()
            optimizer.step()
    return model


def f1_of(model: nn.Module, system: System, x: Tensor, y: Tensor) -> Callable[[Tensor], float]:
    """F1 on held-out rows after a step [P] in the parameters."""
    names = {p: name for name, p in model.named_parameters()}
    start = {name: p.detach() for name, p in model.named_parameters()}

    def f1(step: Tensor) -> float:
        moved = dict(start)
        for block, part in system.space.split(step[None]).items():
            for p, change in zip(block.parameters, block.from_layout(part[0]), strict=True):
                moved[names[p]] = start[names[p]] + change
        right = torch.func.functional_call(model, moved, (x,)).argmax(1) == y
        unlearnt, kept = 1 - float(right[y == CLASS].double().mean()), float(right[y != CLASS].double().mean())
        return 2 * unlearnt * kept / max(1e-12, unlearnt + kept)

    return f1


def all_rows(system: System) -> Tensor:
    """The gradients f of every row under every label [N, C, P]."""
    places, formed = [], []
    for where, gradients in system.fisher.batches(None, 0):
        places.append(where)
        formed.append(system.space.join({b: gradients.formed(b) for b in system.space.blocks}))
    order = torch.cat(places).argsort(stable=True)
    return torch.cat(formed)[order].view(system.fisher.rows, -1, system.space.size)


def measured(quick: bool) -> dict[str, Any]:
    """F1, relative error and trace for every sampler and size."""
    x, y = shuffled_digits(0)
    rows, test = slice(0, 300 if quick else ROWS), slice(ROWS, None)
    seeds, sizes = (2, (50,)) if quick else (60, SIZES)
    model = trained(x[rows], y[rows], 20 if quick else 80)
    of_class = y[rows] == CLASS
    share = float(of_class.double().mean())
    removal = CallableQuery(
        lambda module, batch: share * cross_entropy(module, batch), (x[rows][of_class], y[rows][of_class])
    )
    context = context_of(model, cross_entropy, (x[rows], y[rows]), {"class": removal})
    system = system_of(context, IF("lissa", damping=DAMPING))
    f, f1 = all_rows(system), f1_of(model, system, x[test], y[test])
    v = system.space.join(context.query_gradients()).detach()

    def solved(which: Tensor, weights: Tensor) -> tuple[Tensor, float]:
        """The solution by a weighted Fisher of some rows, and the Fisher's trace."""
        part = (f[which] * weights.to(f).sqrt()[:, None, None]).flatten(0, 1)
        matrix = part.T @ part
        return torch.cholesky_solve(v.T, torch.linalg.cholesky(matrix + torch.diag(system.damping))).T, float(
            matrix.trace()
        )

    wanted, whole = solved(torch.arange(len(f)), torch.full((len(f),), 1 / len(f)))
    scale = max(SCALES, key=lambda tau: f1(tau * wanted[0]))
    found: dict[str, Any] = {}
    for name in track(SAMPLERS, description="samplers"):
        sampler = driven(context, sampler_of(IF("lissa", sampler=name), context, system.fisher))
        for size in sizes:
            errors, unlearnt, traces = [], [], []
            for seed in range(1 if name == "topk" else seeds):  # topk draws the same rows each time
                which, weights = sampler.draw(len(f), size, torch.Generator().manual_seed(seed))
                step, trace = solved(which, weights)
                errors.append(float(relative_error(step, wanted)))
                unlearnt.append(f1(scale * step[0]))
                traces.append(trace / whole)
            of_name = found.setdefault(name, {})
            of_name[str(size)] = {
                "F1": mean_and_error(unlearnt),
                "error": mean_and_error(errors),
                "trace": mean_and_error(traces),
            }
    zero = torch.zeros_like(wanted[0])
    return {
        "rows": len(f),
        "seeds": seeds,
        "tau": scale,
        "f1 before": f1(zero),
        "f1 of all rows": f1(scale * wanted[0]),
        "samplers": found,
    }
