"""Small trained models with their Fisher as a matrix, by Jacobians of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.methods import FitContext, FitEndMethods
from ine_callback.methods.influence.curvature import Curvature
from ine_callback.methods.influence.influence import IF
from ine_callback.scores import Attribution
from tests.helpers.contexts import CLASSES, LABELS, ROWS, VECTORS, WIDTH, bound, entropy, numbers


def squared(module: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def bits(module: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0]), batch[1])


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


NUMBERS, BITS = numbers(ROWS, 2), (numbers(ROWS, 2) > 0).double()
LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Tensor], Tensor, int]] = {
    "cross entropy": (entropy, LABELS, CLASSES),
    "squared error": (squared, NUMBERS, 2),
    "bits": (bits, BITS, 2),
}


@dataclass
class Dense:
    """A problem and what a matrix says about it.

    Attributes:
        fisher: Of the mean loss [P, P], with second derivatives of the loss in the outputs.
        parts: Each row's part of it [N, P, P].
        rows: Each row's gradient [N, P] of its part of the mean loss, times N.
        queries: The queries' gradients [Q, P].
    """

    context: FitContext
    fisher: Tensor
    parts: Tensor
    rows: Tensor
    queries: Tensor

    def scores(self, damping: float) -> Tensor:
        """``1/N <v, (F + damping)^-1 g>`` [N, Q]."""
        matrix = self.fisher + damping * torch.eye(len(self.fisher)).double()
        return torch.linalg.solve(matrix, self.queries.T).T.mm(self.rows.T).T / len(self.rows)

    def run(self, method: IF) -> Attribution:
        methods = FitEndMethods([method], "Test", "raise")
        methods.run(self.context)
        return methods.found[0]


def dense(module: nn.Module, loss: Callable[[nn.Module, Any], Tensor], data: tuple[Tensor, Tensor]) -> Dense:
    """The matrices, with parameters in the order of the blocks: a layer's weight with its bias as the last column."""
    context = bound(module, loss, data)
    x, y = data
    names = [name for name, _ in module.named_parameters()]
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def output(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (one[None],))[0]

    def value(z: Tensor, target: Tensor) -> Tensor:
        return loss(lambda _: z[None], (None, target[None]))  # type: ignore[arg-type]

    def joined(parts: dict[str, Tensor], lead: int) -> Tensor:
        """In the layout of the blocks."""
        out = []
        for weight in [n for n in names if n.endswith("weight")]:
            w, b = parts[weight], parts.get(weight.removesuffix("weight") + "bias")
            out.append((w if b is None else torch.cat([w, b[..., None]], -1)).flatten(lead))
        return torch.cat(out, -1)

    jacobians = joined(torch.func.vmap(torch.func.jacrev(output), (None, 0))(parameters, x), 2)
    outputs = module(x).detach()
    curvature = torch.func.vmap(torch.func.hessian(value))(outputs, y)
    slopes = torch.func.vmap(torch.func.grad(value))(outputs, y)
    parts = jacobians.mT @ curvature @ jacobians
    queries = []
    for query in context.queries:
        total = sum(w * query.value(module, batch) for w, batch in query.batches)
        gradients = torch.autograd.grad(total, list(module.parameters()))  # type: ignore[arg-type]
        queries.append(joined(dict(zip(names, gradients, strict=True)), 0))
    rows = (slopes[:, None] @ jacobians)[:, 0]
    return Dense(context, parts.mean(0), parts, rows, torch.stack(queries))


def problem(case: str = "cross entropy") -> Dense:
    loss, targets, outputs = LOSSES[case]
    return dense(network(outputs), loss, (VECTORS, targets))


def curvature(found: Dense, settings: IF, fisher: str = "exact") -> Curvature:
    made = Curvature(found.context, settings, fisher)  # type: ignore[arg-type]
    for asked, take in made.passes():
        for rows, gradients in found.context.per_sample(asked):
            take(rows, gradients)
    return made


def relative(found: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())
