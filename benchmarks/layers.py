"""Pruning by the sensitivity of blocks (LayerIF), beside uniform, reversed, shuffled and depth-ramp plans.

    python -m benchmarks.layers --json layers.json

A residual network on digits is trained, the sensitivity of its blocks is read off scores by layer, and the smallest
weights of each block are set to 0, as many as each plan says. All plans have the same budget.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

from benchmarks.data import digits
from benchmarks.layer_tables import places, shown
from benchmarks.network import machine
from ine_callback.applications.layer_plan import LayerPlan
from ine_callback.applications.layer_sensitivity import layer_sensitivity
from ine_callback.scores import Attribution, Floats, LayerScores, QueryInfo

BLOCKS, WIDTH, CLASSES = 8, 48, 10
TRAIN, HELD_OUT = 900, 200
SCORED_ROWS, QUERY_ROWS = 300, 50
BUDGETS = (0.5, 0.7, 0.8)
EPSILON = 0.3
QUERY = QueryInfo("val", "loss", "Does training on this row lower the mean loss of the held-out rows?")


class Data(NamedTuple):
    """Rows x with labels y: to train on, to ask about, and to test on."""

    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor
    xt: Tensor
    yt: Tensor


def load() -> Data:
    x, y = digits(None)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, held_out, test = order.tensor_split([TRAIN, TRAIN + HELD_OUT])
    return Data(x[train], y[train], x[held_out], y[held_out], x[test], y[test])


class Residual(nn.Module):
    """x + W2 relu(W1 norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


def trained(seed: int, data: Data, epochs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(Residual() for _ in range(BLOCKS)))
    model = nn.Sequential(nn.Linear(data.x.shape[1], WIDTH), blocks, nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    return model


def layer_scores(model: nn.Module, data: Data) -> LayerScores:
    """Scores of the first rows through each matrix of the blocks alone, by DataInf; > 0: helpful.

    For row gradients g_i [n, d] and the query's gradient v of one matrix:

        s_i = g_i·h / n,   h = sum over i of (v - g_i (g_i·v) / (λ + |g_i|²)) / (n λ),   λ = sum |g_i|² / (10 n d)
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    matrices = [name for name in parameters if name.startswith("1.") and name.endswith(("up.weight", "down.weight"))]

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    rows = each(parameters, data.x[:SCORED_ROWS], data.y[:SCORED_ROWS])
    query = each(parameters, data.xq[:QUERY_ROWS], data.yq[:QUERY_ROWS])
    columns = []
    for name in matrices:
        g, v = rows[name].flatten(1).double(), query[name].flatten(1).double().mean(0)
        norms, along = g.square().sum(1), g @ v
        damping = 0.1 * norms.mean() / g.shape[1]
        h = (v - (along / (damping + norms)) @ g / len(g)) / damping
        columns.append(g @ h / len(g))
    return LayerScores(tuple(matrices), torch.stack(columns, 1)[:, :, None].numpy())


def plans(sensitivity: Floats, budget: float, seed: int) -> dict[str, Floats]:
    """The fraction of each block's weights to prune, by plan."""
    names = tuple(f"block {k}" for k in range(BLOCKS))
    found = LayerPlan(names, sensitivity).sparsity(budget, EPSILON)
    return {
        "uniform": np.full(BLOCKS, budget),
        "LayerIF": found.values,
        "reversed": found.reversed,
        "shuffled": np.random.default_rng(seed).permutation(found.values),
        "depth ramp": found.ramp,
    }


def pruned(model: nn.Sequential, fractions: Floats) -> nn.Sequential:
    """A copy whose blocks lack these fractions of their matrices' weights, the smallest ones."""
    model = copy.deepcopy(model)
    for k, fraction in enumerate(fractions.tolist()):
        for name in ("up", "down"):
            prune.l1_unstructured(model.get_submodule(f"1.{k}.{name}"), "weight", fraction)
    return model


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data.xt).argmax(1) == data.yt).double().mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--seeds", type=int, default=40, help="trainings (at least 2)")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 3 epochs: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds, epochs = (2, 3) if args.quick else (args.seeds, 15)
    data = load()
    dense: list[float] = []
    sensitivities: list[list[float]] = []
    accuracies: dict[str, dict[str, list[float]]] = {}
    for seed in track(range(seeds), description="trainings"):
        model = trained(seed, data, epochs)
        dense.append(accuracy(model, data))
        by_layer = layer_scores(model, data)
        rows = np.arange(len(by_layer.scores))
        found = Attribution("DataInf", rows, (QUERY,), by_layer.scores.sum(1), layers=by_layer)
        sensitivity = layer_sensitivity(found).of("val")
        sensitivities.append((sensitivity / sensitivity.max()).tolist())
        for budget in BUDGETS:
            for name, fractions in plans(sensitivity, budget, seed).items():
                of_plan = accuracies.setdefault(f"{budget:g}", {}).setdefault(name, [])
                of_plan.append(accuracy(pruned(model, fractions), data))
    results: dict[str, Any] = {
        "protocol": "layers",
        "machine": machine(),
        "seeds": seeds,
        "epochs": epochs,
        "dense": dense,
        "sensitivity": sensitivities,
        "accuracy": accuracies,
    }
    args.json.write_text(json.dumps(results, indent=1))
    print(shown(results))
    print(places(results))


if __name__ == "__main__":
    main()
