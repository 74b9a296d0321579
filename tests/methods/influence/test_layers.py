"""Curvature of layers beyond linear ones: convolutions, tables, tied and reused weights, by formed gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import IF
from ine_callback.methods import FitContext, FitEndMethods, PerSamplePass
from tests.helpers.contexts import CLASSES, LABELS, ROWS, VECTORS, Tied, Twice, bound, choices, entropy, numbers
from tests.methods.influence.conftest import Dense, curvature, relative

TOKENS = 5
IDS = choices(7, ROWS, TOKENS)


def tokens(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]).mT, batch[1])


def convolutions() -> nn.Module:
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 2, groups=1), nn.Flatten()
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Linear(2, CLASSES))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[Tensor, Tensor], int]] = {
    "convolutions": (convolutions, entropy, (VECTORS, LABELS), 1),
    "tied": (Tied, tokens, (IDS, IDS.roll(1, 1)), TOKENS),
    "one layer twice": (Twice, entropy, (VECTORS, LABELS), 1),
    "table": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)),
        tokens,
        (IDS, IDS.roll(1, 1)),
        TOKENS,
    ),
}


def context_of(case: str) -> tuple[FitContext, Tensor]:
    """A problem, and its rows' gradients [N, P] in the order of the parameters' blocks."""
    make, loss, data, terms = CASES[case]
    torch.manual_seed(2)
    context = bound(make().double(), loss, data)
    parts: dict[Any, list[Tensor]] = {}
    for _, gradients in context.per_sample(PerSamplePass()):
        for block in gradients:
            parts.setdefault(block, []).append(gradients.formed(block).flatten(1))
    ordered = sorted(parts, key=lambda block: block.position)
    # the Fisher of a mean over terms: a row's gradient is the mean of its own
    return context, torch.cat([torch.cat(parts[block]) for block in ordered], 1) * terms**0.5


@pytest.mark.parametrize("case", CASES)
def test_the_exact_solution_is_that_of_the_formed_gradients(case: str) -> None:
    context, rows = context_of(case)
    terms = CASES[case][3]
    methods = FitEndMethods([IF("exact", fisher="empirical", damping=0.01)], "Test", "raise")
    methods.run(context)
    made = curvature(Dense(context, rows, rows, rows, rows), IF("exact", fisher="empirical", damping=0.01), "empirical")
    v = made.system().space.join(context.query_gradients())
    fisher = rows.T @ rows / ROWS + 0.01 * torch.eye(rows.shape[1]).double()
    wanted = rows / terms**0.5 @ torch.linalg.solve(fisher, v.T) / ROWS
    assert relative(methods.found[0].scores, wanted) < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_eigenvalues_are_diagonals_in_their_basis(case: str) -> None:
    context, rows = context_of(case)
    made = curvature(Dense(context, rows, rows, rows, rows), IF(fisher="empirical", damping=0.01), "empirical")
    assert made._ekfac is not None
    start = 0
    for block in made.system().space.blocks:
        values = made._ekfac.eigenvalues(block)
        part = rows[:, start : start + values.numel()].reshape(ROWS, *block.layout)
        start += values.numel()
        left, right = made._ekfac._vectors[block.name]
        part = part if left is None else left.mT @ part
        part = part if right is None else part @ right
        np.testing.assert_allclose(values, part.square().mean(0), rtol=1e-9, atol=1e-15)
    assert start == rows.shape[1]


def test_products_with_vectors_need_no_formed_gradient() -> None:
    for case in CASES:
        context, rows = context_of(case)
        made = curvature(
            Dense(context, rows, rows, rows, rows), IF("cg", fisher="empirical", damping=0.01), "empirical"
        )
        x = numbers(2, rows.shape[1])
        system = made.system()
        assert relative(system.fisher.product(system.space, x), x @ rows.T @ rows / ROWS) < 1e-10, case
