"""Does leaving a row out of a network do what its score says? Retraining to convergence, from the trained weights.

A network 64-8-10 on 200 digits, of which 20 have a wrong label. L-BFGS trains it from random weights, then from there
again in coordinates in which the second derivatives are the identity: 60 trainings without a row reach gradients that
are zero for all that matters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.influence.calibration import ROWS, compared
from benchmarks.influence.shared import context_of, network, scored, shuffled_digits
from benchmarks.network import RowLosses, cross_entropy
from ine_callback import IF

HIDDEN, WEIGHT_DECAY, FLIPPED, LEFT_OUT, NETWORKS = 8, 2e-3, 20, 60, 5


class Objective:
    """The regularised mean loss, as a function of all weights in one vector [P]."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        self.module, self.x, self.y = module, x, y
        self.kept = torch.ones(len(y)).to(x)  # weight of each row: what is left out has 0

    def logits(self, w: Tensor, x: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in self.module.parameters()])
        named = zip(self.module.named_parameters(), parts, strict=True)
        out: Tensor = functional_call(self.module, {name: part.view_as(p) for (name, p), part in named}, (x,))
        return out

    def __call__(self, w: Tensor) -> Tensor:
        losses = F.cross_entropy(self.logits(w, self.x), self.y, reduction="none")
        return (self.kept * losses).mean() + WEIGHT_DECAY / 2 * w.square().sum()


def minimised(objective: Objective, start: Tensor, whitener: Tensor, iterations: int) -> Tensor:
    """Weights by L-BFGS in coordinates u, ``w = start + whitener u``."""
    u = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u],
        max_iter=iterations,
        tolerance_grad=1e-11,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(start + whitener @ u)
        loss.backward()
        return loss

    optimizer.step(closure)
    return start + whitener @ u.detach()


def whitener_of(objective: Objective, w: Tensor) -> Tensor:
    """``H^-1/2`` [P, P] with the eigenvalues of the second derivatives H by their size."""
    values, vectors = torch.linalg.eigh(hessian(objective)(w))
    found: Tensor = vectors / values.abs().clamp_min(WEIGHT_DECAY / 10).sqrt()
    return found


def trained(objective: Objective, start: Tensor, iterations: int) -> Tensor:
    w = minimised(objective, start, torch.eye(len(start)).to(start), iterations)
    for _ in range(3):
        w = minimised(objective, w, whitener_of(objective, w), iterations)
    return w


def network_rows(seed: int, left_out: int, iterations: int) -> dict[str, Any]:
    """Predictions against retraining for the first rows of one split of the digits."""
    images, labels = shuffled_digits(seed)
    x, y = images[:ROWS], labels[:ROWS].clone()
    y[:FLIPPED] = (y[:FLIPPED] + 1) % 10
    module = network(HIDDEN, seed, (0.2, 0.2))
    objective = Objective(module, x, y)
    whole = trained(objective, parameters_to_vector(module.parameters()).detach(), iterations)
    vector_to_parameters(whole, module.parameters())
    context = context_of(module, cross_entropy, (x, y), {"row": RowLosses(x[:left_out], y[:left_out])})
    rows = tuple(range(left_out))
    predicted = {
        "IF": scored(context, IF("exact", damping=WEIGHT_DECAY, rows=rows)).scores.diagonal(),
        "RIF": scored(context, IF("exact", damping=WEIGHT_DECAY, rows=rows, rescale="rif")).scores.diagonal(),
    }
    whitener = whitener_of(objective, whole)
    gradients, linear, loss = [float(grad(objective)(whole).norm())], np.empty(left_out), np.empty(left_out)
    for k in track(rows, description=f"network without a row, seed {seed}"):
        objective.kept[k] = 0.0
        without = minimised(objective, whole, whitener, iterations)
        gradients.append(float(grad(objective)(without).norm()))
        objective.kept[k] = 1.0

        def own(w: Tensor, k: int = k) -> Tensor:
            return F.cross_entropy(objective.logits(w, x[k : k + 1]), y[k : k + 1])

        linear[k], loss[k] = float(grad(own)(whole) @ (without - whole)), float(own(without) - own(whole))
    found: dict[str, Any] = {"rows": left_out, "gradient": max(gradients)}
    for what, actual in (("own loss to first order", linear), ("own loss", loss)):
        found[what] = {
            name: compared(actual, one) | {"median ratio": float(np.median(one / actual))}
            for name, one in predicted.items()
        }
    return found


def measured(quick: bool) -> list[dict[str, Any]]:
    """The table's numbers for every split of the digits."""
    networks, left_out, iterations = (1, 3, 100) if quick else (NETWORKS, LEFT_OUT, 500)
    return [network_rows(seed, left_out, iterations) for seed in range(networks)]
