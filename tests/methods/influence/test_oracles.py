"""IF against the Fisher as a matrix: curvature, solvers, rescaling, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ine_callback import IF
from ine_callback.methods import FitEndMethods
from ine_callback.methods.influence.solvers.exact import dense_fisher
from tests.helpers.contexts import VECTORS, WIDTH, bound, numbers
from tests.methods.influence.conftest import LOSSES, NUMBERS, curvature, dense, problem, relative, squared

DAMPING = 5e-3


@pytest.mark.parametrize("case", LOSSES)
def test_the_exact_fisher_is_the_gauss_newton_matrix(case: str) -> None:
    found = problem(case)
    matrix = dense_fisher(curvature(found, IF(solver="exact", damping=1.0)).system())
    assert relative(matrix - torch.eye(len(matrix)).double(), found.fisher) < 1e-10


@pytest.mark.parametrize("case", LOSSES)
def test_exact_scores_are_those_of_the_dense_solution(case: str) -> None:
    found = problem(case)
    scores = found.run(IF(solver="exact", damping=DAMPING))
    assert relative(scores.scores, found.scores(DAMPING)) < 1e-9
    assert scores.residual.max() < 1e-12 and scores.settings["fisher"] == "exact"


def test_eigenvalues_are_the_fishers_diagonal_in_the_kronecker_basis() -> None:
    found = problem()
    made = curvature(found, IF(damping=1.0))
    ekfac, kfac, start = made._ekfac, made._kfac, 0
    assert ekfac is not None and kfac is not None
    for block in made.system().space.blocks:
        values = ekfac.eigenvalues(block)
        part = found.fisher[start : start + values.numel(), start : start + values.numel()]
        start += values.numel()
        left, right = kfac.eigenvectors(block)
        assert left is not None and right is not None
        basis = torch.kron(left[0], right[0])
        diagonal = torch.einsum("pk,pq,qk->k", basis, part, basis)
        assert relative(values.flatten(), diagonal) < 1e-10
        assert float(values.sum()) == pytest.approx(float(part.trace()), rel=1e-10)
        products = kfac.operator(block, lambda *x: x[0] * x[1]).weight
        assert products is not None

        def error(diagonal: torch.Tensor, basis: torch.Tensor = basis, part: torch.Tensor = part) -> float:
            return float((basis @ torch.diag(diagonal.flatten()) @ basis.T - part).norm())

        assert error(values) <= error(products)


def test_kronecker_factors_are_exact_for_one_linear_layer_and_squared_errors() -> None:
    found = dense(nn.Linear(WIDTH, 2).double(), squared, (VECTORS, NUMBERS))
    wanted = found.scores(DAMPING)
    for solver in ("kfac", "ekfac", "exact"):
        assert relative(found.run(IF(solver=solver, damping=DAMPING)).scores, wanted) < 1e-10


def test_the_diagonal_solver_divides_by_the_diagonal() -> None:
    found = problem()
    x = found.queries / (found.fisher.diagonal() + DAMPING)
    wanted = found.rows @ x.T / len(found.rows)
    assert relative(found.run(IF(solver="diagonal", damping=DAMPING)).scores, wanted) < 1e-10


def test_identity_is_the_gradients_dot_product() -> None:
    found = problem()
    assert relative(found.run(IF(solver="identity")).scores, found.rows @ found.queries.T / len(found.rows)) < 1e-10


def test_automatic_damping_is_a_tenth_of_each_blocks_mean_eigenvalue() -> None:
    found = problem()
    scores = found.run(IF(solver="exact"))
    sizes = [5 * (WIDTH + 1), 3 * 6]
    means = [
        0.1 * part.diagonal().mean()
        for part in (found.fisher[: sizes[0], : sizes[0]], found.fisher[sizes[0] :, sizes[0] :])
    ]
    assert np.allclose(scores.damping, [float(m) for m in means], rtol=1e-10)
    matrix = found.fisher + torch.diag(
        torch.cat([torch.full((n,), float(m), dtype=torch.float64) for n, m in zip(sizes, means, strict=True)])
    )
    wanted = found.rows @ torch.linalg.solve(matrix, found.queries.T) / len(found.rows)
    assert relative(scores.scores, wanted) < 1e-9


def test_layers_add_up_and_can_be_chosen() -> None:
    found = problem()
    both = found.run(IF(solver="exact", damping=DAMPING, per_layer=True))
    assert both.layers is not None and both.layers.names == ("0.weight", "2.weight")
    assert relative(both.layers.scores.sum(1), both.scores) < 1e-12
    size = 3 * 6
    last = found.run(IF(solver="exact", damping=DAMPING, layers="last"))
    block = found.fisher[-size:, -size:] + DAMPING * torch.eye(size).double()
    wanted = found.rows[:, -size:] @ torch.linalg.solve(block, found.queries[:, -size:].T) / len(found.rows)
    assert relative(last.scores, wanted) < 1e-9
    assert relative(found.run(IF(solver="exact", damping=DAMPING, layers=["2"])).scores, wanted) < 1e-9


def test_some_rows_are_scored_by_the_curvature_of_all() -> None:
    found = problem()
    some = found.run(IF(solver="exact", damping=DAMPING, rows=[7, 3]))
    assert some.rows.tolist() == [7, 3]
    assert relative(some.scores, found.scores(DAMPING)[[7, 3]]) < 1e-9


@pytest.mark.parametrize("case", LOSSES)
def test_rescaling_takes_the_rows_own_part_out_of_the_fisher(case: str) -> None:
    found = problem(case)
    count, eye = len(found.rows), torch.eye(len(found.fisher)).double()
    wanted = torch.stack(
        [
            torch.linalg.solve(found.fisher + DAMPING * eye - part / count, g) @ found.queries.T / count
            for part, g in zip(found.parts, found.rows, strict=True)
        ]
    )
    scores = found.run(IF(solver="exact", damping=DAMPING, rescale="rif"))
    assert relative(scores.scores, wanted) < 1e-9
    inverse = torch.linalg.inv(found.fisher + DAMPING * eye)
    leverages = torch.linalg.eigvals(inverse @ found.parts / count).real.amax(1)
    assert relative(scores.leverage, leverages) < 1e-8


@pytest.mark.parametrize("ridge", [1e-9, 0.7])
def test_rescaled_scores_of_least_squares_are_exactly_leaving_one_row_out(ridge: float) -> None:
    """With the regulariser kept as it is; the queries are linear in the weights."""
    x, y = VECTORS, numbers(len(VECTORS), 1)
    count, size = x.shape
    hessian = 2 * x.T @ x / count + ridge * torch.eye(size).double()
    module = nn.Linear(size, 1, bias=False).double()

    def fitted(rows: torch.Tensor) -> torch.Tensor:
        part = 2 * x[rows].T @ x[rows] / count + ridge * torch.eye(size).double()
        return torch.linalg.solve(part, 2 * x[rows].T @ y[rows] / count)[:, 0]

    whole = fitted(torch.arange(count))
    with torch.no_grad():
        module.weight.copy_(whole)
    found = dense(module, squared, (x, y))
    directions = numbers(2, size)
    for query, direction in zip(found.context.queries, directions, strict=True):
        object.__setattr__(query, "value", lambda module, batch, d=direction: (module.weight[0] * d).sum())
    scores = found.run(IF(solver="exact", damping=ridge, rescale="rif"))
    without = torch.stack([fitted(torch.arange(count)[torch.arange(count) != k]) for k in range(count)])
    assert relative(scores.scores, (without - whole) @ directions.T) < 1e-10 * (1 if ridge > 1e-3 else 10)
    plain = found.run(IF(solver="exact", damping=ridge))
    assert relative(plain.scores, (without - whole) @ directions.T) > 0.01
    if ridge < 1e-3:
        assert scores.leverage.sum() == pytest.approx(size, rel=1e-6)
    assert bool((torch.linalg.eigvalsh(hessian) > 0).all())


def test_the_rescaling_vanishes_under_strong_damping() -> None:
    found = problem()
    plain, rescaled = (found.run(IF(solver="exact", damping=1e4, rescale=how)).scores for how in (None, "rif"))
    assert np.abs(rescaled / plain - 1).max() < 1e-3


@pytest.mark.parametrize("case", LOSSES)
def test_a_groups_newton_step_takes_all_its_rows_out_together(case: str) -> None:
    found = problem(case)
    groups = {"one": [5], "many": list(range(20, 50))}
    scores = found.run(IF(solver="exact", damping=DAMPING, groups=groups, rescale="rif"))
    count, damped = len(found.rows), found.fisher + DAMPING * torch.eye(len(found.fisher)).double()
    for name, rows in groups.items():
        step = torch.linalg.solve(damped - found.parts[rows].sum(0) / count, found.rows[rows].sum(0)) / count
        assert relative(getattr(scores, f"newton {name}"), found.queries @ step) < 1e-8
    assert relative(getattr(scores, "newton one"), scores.scores[5]) < 1e-9
    assert relative(getattr(scores, "newton many"), scores.scores[groups["many"]].sum(0)) > 0.01


def test_tokens_add_up_and_are_the_positions_part_of_the_gradient() -> None:
    """A table and a linear layer by position; the norm between them has lost its positions."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)).double()
    ids = torch.randint(7, (len(VECTORS), 5), generator=torch.Generator().manual_seed(1))

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0]).mT, batch[1])

    context = bound(module, loss, (ids, ids.roll(1, 1)))
    methods = FitEndMethods([IF(solver="identity", per_token=True, per_layer=True)], "Test", "raise")
    methods.run(context)
    found = methods.found[0]
    assert (
        found.tokens is not None
        and found.layers is not None
        and np.diff(found.tokens.offsets).tolist() == [5] * len(ids)
    )
    parts = np.stack([found.tokens.of(k) for k in range(len(ids))])
    np.testing.assert_allclose(parts.sum(1), found.scores, rtol=1e-10, atol=1e-14)
    query = context.queries[0]
    value = sum(weight * query.value(module, batch) for weight, batch in query.batches)
    directions = torch.autograd.grad(value, list(module.parameters()))  # type: ignore[arg-type]
    row = 3
    norm = found.layers.scores[row, [k for k, n in enumerate(found.layers.names) if n.startswith("1.")], 0].sum()
    hidden = module[0](ids[row])
    normed = module[1](hidden)
    out = module[2](normed)
    of_out, of_hidden = torch.autograd.grad(nn.functional.cross_entropy(out, ids[row].roll(1)), [out, hidden])
    head = ((normed @ directions[3].T + directions[4]) * of_out).sum(1)
    table = (directions[0][ids[row]] * of_hidden).sum(1)
    wanted = (head + table).detach().numpy() / len(ids) + norm / 5
    np.testing.assert_allclose(parts[row, :, 0], wanted, rtol=1e-9, atol=1e-14)
