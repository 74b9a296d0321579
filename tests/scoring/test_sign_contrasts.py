"""Contrasts: signals split by output units, their signs, and the intervals that they give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.capture import Block
from ine_callback.capture.per_sample_gradients import GradSample, Lookup, Outer, Vector
from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import QueryInfo, Scores
from ine_callback.scoring.sign_contrasts import Contrasts, signed_by
from ine_callback.utilities.options import InitialWeights


def outer(positions: int, groups: int = 1) -> Outer:
    return Outer(torch.randn(5, groups, positions, 4).double(), torch.randn(5, groups, positions, 3).double())


def block(units: int, position: int = 0) -> Block:
    return Block("weight", (nn.Parameter(torch.ones(units)),), (units,), position)


@pytest.mark.parametrize(
    ("grad_sample", "other_axes"),
    [
        (outer(1), (4,)),
        (outer(6), (4,)),
        (outer(6, groups=2), (4,)),
        (Lookup(torch.randint(4, (5, 6)), torch.randn(5, 6, 3).double(), 4), (2, 3)),
        (Vector(torch.randn(5, 3).double()), ()),
    ],
)
@pytest.mark.parametrize("queries", [1, 2])
def test_parts_are_the_products_of_each_unit(
    grad_sample: GradSample, other_axes: tuple[int, ...], queries: int
) -> None:
    u = torch.randn(queries, *grad_sample.layout).double()
    products = grad_sample.gradient(slice(0, 5))[:, None] * u
    by_unit = (products.sum(other_axes) if other_axes else products).reshape(5, queries, -1)
    weights = torch.randn(4, by_unit.shape[2]).double()
    torch.testing.assert_close(grad_sample.parts(u, weights), by_unit @ weights.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_sample.parts(u, weights[:1]), by_unit @ weights[:1].T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_sample.signals(u), by_unit.sum(2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_last_layer_is_split_by_its_inputs(positions: int, queries: int) -> None:
    grad_sample, contrasts = outer(positions, groups=2), Contrasts(4)
    last, inner = block(3), block(3)
    last.outputs = True
    u = torch.randn(queries, *grad_sample.layout).double()
    products = grad_sample.gradient(slice(0, 5))[:, None] * u
    for each, axis in ((last, 3), (inner, 4)):
        found = contrasts.of_queries(each, grad_sample, u)
        by_unit = products.sum(axis).flatten(2)
        signs = contrasts._signs[each, (2, by_unit.shape[2] // 2)].double()
        torch.testing.assert_close(found, by_unit @ signs.T, rtol=1e-10, atol=1e-10)
    if positions == 1:
        energies = grad_sample.gradient(slice(0, 5)).square().sum(2).flatten(1)
        signs = contrasts._signs[last, (2, 4)].double()
        torch.testing.assert_close(contrasts.of_self(last, [grad_sample]), energies @ signs.T, rtol=1e-10, atol=1e-10)


def test_the_last_layer_is_the_first_of_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh())
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, sgd, 6, total_steps=1, on_error="raise")
    with recorder:
        with recorder.batch(torch.arange(6)):
            nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()
    assert {block.name: block.outputs for block in recorder.signals.table} == {"2.weight": True, "0.weight": False}


def test_signs_are_balanced_and_the_same_in_every_run() -> None:
    contrasts, ten = Contrasts(4), block(10)
    signs = contrasts.signs(ten, (10,))
    assert signs.abs().eq(1).all() and signs[0].eq(1).all() and signs[1:].sum(1).eq(0).all()
    assert contrasts.signs(ten, (10,)) is signs
    assert Contrasts(4).signs(block(10), (10,)).equal(signs)
    assert not contrasts.signs(block(10, 1), (10,)).equal(signs)  # layers are independent
    assert contrasts.signs(ten, (1, 3)).shape == (5, 3)  # a tied weight used in another way


def each_unit(grad_sample: GradSample) -> Tensor:
    """Energies of every single unit."""
    return grad_sample.unit_energies(torch.eye(math.prod(grad_sample.units)).double())


@pytest.mark.parametrize(
    ("grad_sample", "others"),
    [(outer(1), 3), (outer(1, groups=2), 3), (Vector(torch.randn(5, 3).double()), ())],
)
def test_unit_energies_are_the_squared_gradients_of_each_unit(
    grad_sample: GradSample, others: int | tuple[int, ...]
) -> None:
    squared = grad_sample.gradient(slice(0, 5)).square()
    expected = (squared.sum(others) if others else squared).flatten(1)
    torch.testing.assert_close(each_unit(grad_sample), expected, rtol=1e-10, atol=1e-10)


def test_unit_energies_of_lazy_gradients_leave_out_products_of_positions() -> None:
    whole = outer(6, groups=2)
    each = [each_unit(Outer(whole.activations[:, :, [k]], whole.output_grads[:, :, [k]])) for k in range(6)]
    torch.testing.assert_close(each_unit(whole), torch.stack(each).sum(0), rtol=1e-10, atol=1e-10)
    table = Lookup(torch.randint(4, (5, 6)), torch.randn(5, 6, 3).double(), 4)
    single = [Lookup(table.ids[:, [k]], table.output_grads[:, [k]], 4).gradient(slice(0, 5)) for k in range(6)]
    expected = torch.stack(single).square().sum((0, 2, 3))
    torch.testing.assert_close(each_unit(table), expected, rtol=1e-10, atol=1e-10)


def test_self_influence_is_signed_by_unit_energies() -> None:
    one, two = outer(1), outer(1)
    contrasts, three = Contrasts(4), block(3)
    signs = contrasts.signs(three, (1, 3)).double()
    energies = each_unit(one) + each_unit(two)
    found = signed_by(contrasts.of_self(three, [one, two]))
    torch.testing.assert_close(found, energies @ signs.T / energies.sum(1, keepdim=True), rtol=1e-10, atol=1e-10)
    assert found[:, 0].eq(1).all() and found[:, 1:].abs().max() <= 1
    assert signed_by(contrasts.of_self(three, [Outer(one.activations, torch.zeros_like(one.output_grads))])).eq(0).all()


def test_a_single_unit_has_no_contrast() -> None:
    assert Contrasts(4).signs(block(1), (1,))[:, 0].tolist() == [1, 0, 0, 0, 0]


def scores(contrasts: Tensor | None) -> Scores:
    """Two steps of 2,000 rows each; the shift's standard error is told by ``contrasts`` alone."""
    fine, rows = FINE(), torch.arange(2000)
    fine.start(2000, (QueryInfo("q", "loss", "?"),), torch.device("cpu"), True, 4)
    for step in range(2):
        signals = torch.randn(2000, 1, generator=torch.Generator().manual_seed(step))
        fine.update(rows, signals, 0.1, torch.full((1,), 2.0), contrasts)
    return fine.compute()


def test_the_standard_error_is_the_contrasts_root_mean_square() -> None:
    # +-3 in every contrast of every row, at both steps: 2 x 3 x rate / unit, with no row noisier than another
    signs = Contrasts(4).signs(block(2000), (2000,))[1:].T
    found = scores(3 * signs[:, None]).se[:, 0]
    assert np.median(found) == pytest.approx(2 * 3 * 0.1 / 2, rel=0.15)  # limma's prior is fitted on four draws a row
    without = scores(None)
    assert np.median(without.se) == pytest.approx(np.sqrt(2) * 0.1 / 2, rel=0.1)
    assert scores(torch.zeros(2000, 1, 4)).se == pytest.approx(without.se)  # a query that has none


def one_run(seed: int, weights: InitialWeights) -> Scores:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32)[:700] / 16, torch.tensor(y)[:700]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    recorder = Recorder(
        *(model, optimizer, 500, {"val": (x[500:], y[500:]), "self": "self"}, loss, [FINE(closing=False)]),
        total_steps=60,
        initial_weights=weights,
        on_error="raise",
    )
    with recorder:
        for _ in range(12):
            for rows in torch.randperm(500).split(100):
                with recorder.batch(rows, (x[rows], y[rows])):
                    loss(model, (x[rows], y[rows])).backward()
                optimizer.step()
                optimizer.zero_grad()
    return recorder.report().scores


@pytest.mark.long
def test_an_interval_holds_the_mean_of_other_trainings() -> None:
    """Few observations, all alike within a training: their scatter alone holds under 80 %, of self-influence half."""
    runs = [one_run(seed, "random") for seed in range(8)]
    mu = np.stack([run.mu for run in runs])
    held = np.mean([np.abs(mu[k] - np.delete(mu, k, 0).mean(0)) <= 1.96 * run.se for k, run in enumerate(runs)], (0, 1))
    assert (held >= 0.85).all() and held[0] <= 0.995
    ratio = np.sqrt(np.mean([run.se**2 for run in runs], (0, 1)) / mu.var(0, ddof=1).mean(0))
    assert (ratio >= 0.8).all() and (ratio <= 2.5).all()
    assert one_run(0, "fixed").se.mean() > 0
