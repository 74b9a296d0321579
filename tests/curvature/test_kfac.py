"""The discount against dense matrix exponentials, and against the rest of an SGD run on a quadratic loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Lookup, Outer, Vector
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import exponential
from tests.helpers.factors import block, dense, draw, observed, outer

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def moment(x: Tensor) -> Tensor:
    """Sum over rows and positions of x x^T for x [b, G, P, K], by a loop."""
    total = torch.zeros(x.shape[1], x.shape[3], x.shape[3], dtype=x.dtype)
    for row in x:
        for g, positions in enumerate(row):
            for p in positions:
                total[g] += torch.outer(p, p)
    return total


def kron_of(grad_sample: Outer) -> Tensor:
    """The factors' Kronecker product per group [G, O I, O I]: summed output side, averaged input side."""
    left, right = (
        moment(grad_sample.output_grads),
        moment(grad_sample.activations) / (grad_sample.activations.shape[0] * grad_sample.activations.shape[2]),
    )
    return torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)])


# -- one block ---------------------------------------------------------------------------------------------------------


def test_discount_equals_the_matrix_exponential_where_the_fisher_is_kronecker() -> None:
    """Every output gradient meets every input, so the Fisher of the mean loss *is* the product of its factors."""
    a, delta = draw(4, 3), draw(3, 2)
    n = 12
    rows_a, rows_delta = a.repeat_interleave(3, 0), delta.repeat(4, 1)
    g = torch.einsum("bo,bi->boi", rows_delta, rows_a).flatten(1)
    fisher = sum(torch.outer(x, x) for x in g) / n
    shares = Outer(rows_a[:, None, None], rows_delta[:, None, None] / n)
    own, kfac = observed(shares, terms=float(n))
    v = draw(4, *own.layout)
    for exponent, decay in [(0.3, 0.0), (2.0, 0.1), (0.0, 0.7)]:
        d = torch.linalg.matrix_exp(-(exponent * fisher + decay * torch.eye(6, dtype=torch.float64)))
        found = kfac.operator(own, exponential(exponent, decay))
        torch.testing.assert_close(found.apply(v).flatten(1), v.flatten(1) @ d.T, **EXACT)
        expected = torch.stack([((g / n) @ d * (g / n)).sum(1), ((g / n) @ d).square().sum(1)], 1)
        torch.testing.assert_close(found.norms(shares), expected, **EXACT)


def test_grouped_layers_have_one_exponential_a_group() -> None:
    grad_sample = outer(rows=5, groups=3, positions=4)
    own, kfac = observed(grad_sample, terms=2.0)
    found = dense(kfac.operator(own, exponential(0.5)), own.layout)
    truth = torch.block_diag(*[torch.linalg.matrix_exp(-0.5 * 2.0 * f) for f in kron_of(grad_sample)])
    torch.testing.assert_close(found, truth, **EXACT)


def test_the_discount_of_one_parameter_is_a_plain_exponential() -> None:
    """A single weight: the Fisher is a number, the discount its exponential."""
    deltas = draw(6, 1, 1, 1) / 6
    own, kfac = observed(Outer(torch.full((6, 1, 1, 1), 3.0).double(), deltas), terms=6.0)
    fisher = sum((6 * float(d) * 3) ** 2 for d in deltas.flatten()) / 6
    assert float(kfac.operator(own, exponential(0.01)).weight) == pytest.approx(math.exp(-0.01 * fisher), rel=1e-12)


@pytest.mark.parametrize(
    "grad_sample",
    [outer(positions=3), outer(groups=2, positions=2), outer(), Vector(draw(5, 3)), "lookup"],
    ids=["positions", "groups", "plain", "vector", "lookup"],
)
def test_self_influence_equals_the_dense_form(grad_sample: GradSample | str) -> None:
    """<D g_i, g_i> with D built densely from the factors' definitions."""
    if isinstance(grad_sample, str):
        grad_sample = Lookup(torch.randint(4, (5, 6)), draw(5, 6, 2), 4)
    if isinstance(grad_sample, Lookup):
        counts = grad_sample.ids.flatten().bincount(minlength=4).double() / grad_sample.ids.numel()
        fisher = torch.kron(torch.diag(counts), moment(grad_sample.output_grads[:, None])[0])
    elif isinstance(grad_sample, Vector):
        fisher = torch.diag(sum(g.square() for g in grad_sample.g))
    else:
        assert isinstance(grad_sample, Outer)
        fisher = torch.block_diag(*kron_of(grad_sample))
    own, kfac = observed(grad_sample, terms=3.0)
    d = torch.linalg.matrix_exp(-(0.2 * 3.0 * fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64)))
    found = kfac.operator(own, exponential(0.2, 0.05))
    g = grad_sample.gradient(slice(0, 5)).flatten(1)
    expected = torch.stack([torch.stack([x @ d @ x, (d @ x).square().sum()]) for x in g])
    torch.testing.assert_close(found.norms(grad_sample), expected, **EXACT)
    torch.testing.assert_close(dense(found, own.layout), d, **EXACT)
    torch.testing.assert_close(found.norms_of_sum([grad_sample]), expected, **EXACT)


def test_self_influence_of_a_reused_block_is_that_of_the_summed_gradient() -> None:
    one, two = outer(positions=2), outer(positions=2)
    own, kfac = observed([one, two])
    left = moment(one.output_grads)[0] + moment(two.output_grads)[0]
    right = (moment(one.activations)[0] + moment(two.activations)[0]) / (2 * 5 * 2)
    d = torch.linalg.matrix_exp(-0.1 * torch.kron(left, right))
    g = (one.gradient(slice(0, 5)) + two.gradient(slice(0, 5))).flatten(1)
    found = kfac.operator(own, exponential(0.1))
    expected = torch.stack([torch.stack([x @ d @ x, (d @ x).square().sum()]) for x in g])
    torch.testing.assert_close(found.norms_of_sum([one, two]), expected, **EXACT)
    torch.testing.assert_close(dense(found, own.layout), d, **EXACT)


def test_a_tied_block_has_the_diagonal_of_the_summed_fisher() -> None:
    table = Lookup(torch.randint(4, (5, 6)), draw(5, 6, 2), 4)
    head = Outer(draw(5, 1, 6, 2), draw(5, 1, 6, 4))
    own, kfac = observed([head, table], terms=2.0, tied=True)
    counts = table.ids.flatten().bincount(minlength=4).double() / 30
    diagonal = torch.outer(counts, moment(table.output_grads[:, None])[0].diagonal())
    diagonal = diagonal + torch.outer(
        moment(head.output_grads)[0].diagonal(), moment(head.activations)[0].diagonal() / 30
    )
    found = kfac.operator(own, exponential(0.1, 0.3))
    torch.testing.assert_close(found.weight[0], torch.exp(-(0.1 * 2.0 * diagonal + 0.3)), **EXACT)
    g = (head.gradient(slice(0, 5)) + table.gradient(slice(0, 5)))[:, 0]
    expected = torch.stack([(g.square() * found.weight**power).sum((1, 2)) for power in (1, 2)], 1)
    torch.testing.assert_close(found.norms_of_sum([head, table]), expected, **EXACT)


@pytest.mark.parametrize(("out", "inputs"), [(2, 6), (6, 2), (6, 6)])
def test_sides_larger_than_max_dim_are_diagonal(out: int, inputs: int) -> None:
    grad_sample = outer(positions=3, out=out, inputs=inputs)
    own, kfac = observed(grad_sample, max_dim=4)
    left, right = moment(grad_sample.output_grads)[0], moment(grad_sample.activations)[0] / 15
    left = left if out <= 4 else torch.diag(left.diagonal())
    right = right if inputs <= 4 else torch.diag(right.diagonal())
    found = kfac.operator(own, exponential(0.1))
    assert (found.left is None) == (out > 4) and (found.right is None) == (inputs > 4)
    torch.testing.assert_close(
        dense(found, own.layout), torch.linalg.matrix_exp(-0.1 * torch.kron(left, right)), **EXACT
    )


def test_factors_are_the_plain_mean_since_the_first_step() -> None:
    grad_samples = [outer(positions=2) for _ in range(5)]
    own, kfac = observed(*grad_samples)
    left = sum(moment(r.output_grads)[0] for r in grad_samples) / 5
    right = sum(moment(r.activations)[0] / 10 for r in grad_samples) / 5
    torch.testing.assert_close(
        dense(kfac.operator(own, exponential(0.1)), own.layout),
        torch.linalg.matrix_exp(-0.1 * torch.kron(left, right)),
        **EXACT,
    )


def test_micro_batches_of_a_step_add_up_to_the_whole_batch() -> None:
    """Half batches whose losses are halved too: the same shares, the same factors."""
    whole = outer(rows=6, positions=2)
    halves = [Outer(whole.activations[s], whole.output_grads[s]) for s in (slice(0, 3), slice(3, 6))]
    own, kfac = observed(whole, terms=6.0)
    own_halves, kfac_halves = observed(halves, terms=6.0)
    torch.testing.assert_close(
        dense(kfac_halves.operator(own_halves, exponential(0.1)), own.layout),
        dense(kfac.operator(own, exponential(0.1)), own.layout),
        **EXACT,
    )


def test_a_block_that_was_never_observed_has_the_identity() -> None:
    grad_sample = outer()
    discount = KFAC().operator(block(grad_sample), exponential(3.0, 0.0))
    v = draw(2, *grad_sample.layout)
    assert discount.apply(v) is v
    torch.testing.assert_close(discount.norms(grad_sample), grad_sample.squared_norms()[:, None].expand(-1, 2))


def test_discounts_only_shrink() -> None:
    grad_sample = outer(rows=2, positions=1, out=4, inputs=5)  # rank-deficient factors: eigenvalues at and below zero
    own, kfac = observed(grad_sample)
    weight = kfac.operator(own, exponential(1e3)).weight
    assert weight is not None and float(weight.max()) <= 1.0 and float(weight.min()) >= 0.0


# -- the rest of training ----------------------------------------------------------------------------------------------


def test_discounted_signals_are_the_true_change_on_a_quadratic_loss() -> None:
    """METHODS §1 (ii): rows 1/2 (w - w_i)^T H (w - w_i), SGD, a linear query c^T w.

    Truth: train again with a row's shares put back in; both runs follow (1 - eta H)^k exactly, so their difference is
    the row's contribution. The discount is the exponential's limit: errors of eta * lambda^2 * R / 2, here under 0.5 %.
    """
    size, rows, steps, lr = 3, 4, 400, 2e-3
    root = draw(size, size) / 2
    hessian = root @ root.T + 0.2 * torch.eye(size, dtype=torch.float64)
    centres, c = draw(rows, size), draw(size)
    batches = [torch.randperm(rows)[:2] for _ in range(steps)]

    def shares(w: Tensor, batch: Tensor) -> Tensor:
        return (w - centres[batch]) @ hessian / len(batch)

    def train(put_back: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        w, kept = torch.ones(size, dtype=torch.float64), []
        for t, batch in enumerate(batches):
            kept.append(shares(w, batch))
            w = w - lr * kept[-1].sum(0) + lr * put_back.get(t, 0.0)
        return w, kept

    final, kept = train({})
    cholesky = torch.linalg.cholesky(hessian)
    feed = Outer((cholesky.T * size**0.5)[:, None, None], torch.full((size, 1, 1, 1), 1 / size, dtype=torch.float64))
    own, kfac = observed(feed, terms=float(size))
    torch.testing.assert_close(
        dense(kfac.operator(own, exponential(1.0)), own.layout), torch.linalg.matrix_exp(-hessian), **EXACT
    )
    scores, truths = torch.zeros(rows, dtype=torch.float64), []
    for t, batch in enumerate(batches):
        u = kfac.operator(own, exponential(lr * (steps - t - 1))).apply(c.reshape(1, *own.layout))
        grad_sample = Outer(kept[t][:, None, None], torch.ones(2, 1, 1, 1).double())
        scores[batch] += lr * grad_sample.signals(u)[:, 0]
    for row in range(rows):
        own_shares = {t: kept[t][batch == row][0] for t, batch in enumerate(batches) if row in batch}
        without, _ = train(own_shares)
        truths.append((without - final) @ c)
    truth = torch.stack(truths)
    torch.testing.assert_close(scores, truth, rtol=0.0, atol=5e-3 * float(truth.abs().max()))
    undiscounted = sum(lr * (kept[t].sum(0) @ c) for t in range(steps))
    assert (undiscounted - truth.sum()).abs() > 0.2 * truth.abs().max()  # the test can tell a discount from none


@pytest.mark.parametrize("silently", [False, True])
def test_an_eigendecomposition_that_does_not_converge_is_done_in_double(
    monkeypatch: pytest.MonkeyPatch, silently: bool
) -> None:
    """LAPACK gives up on some float32 moments of inputs with dead pixels, or returns NaN; here on all of them."""
    real = torch.linalg.eigh

    def fails_in_single(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float32 and silently:
            return real(x)[0] * torch.nan, real(x)[1]
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(x)

    grad_sample = Outer(torch.randn(5, 1, 1, 3), torch.randn(5, 1, 1, 2))
    own, kfac = observed(grad_sample)
    expected = kfac.operator(own, exponential(0.3)).apply(torch.ones(1, *own.layout))
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    torch.testing.assert_close(kfac.operator(own, exponential(0.3)).apply(torch.ones(1, *own.layout)), expected)


def test_vanishing_gradients_give_a_finite_discount() -> None:
    """Gradients a billion times smaller, and so much more learning to come: the discount is the same."""
    a, delta = torch.randn(50, 1, 1, 40), torch.randn(50, 1, 1, 60)
    own, kfac = observed(Outer(a, delta))
    small, faint = observed(Outer(a, 1e-9 * delta))
    v = torch.randn(2, *own.layout)
    found = faint.operator(small, exponential(1e18 * 1e-3)).apply(v)
    torch.testing.assert_close(found, kfac.operator(own, exponential(1e-3)).apply(v), rtol=1e-3, atol=1e-4)


def test_an_observation_may_stand_for_several_steps() -> None:
    first, later = outer(), outer()
    own, thrice = observed(first, later, later, later)
    once = KFAC()
    once.observe(own, first, 1.0)
    once.end_step()
    once.observe(own, later, 1.0, steps=3)
    once.end_step()
    expected, found = thrice.operator(own, exponential(0.7)), once.operator(own, exponential(0.7))
    torch.testing.assert_close(dense(found, first.layout), dense(expected, first.layout), **EXACT)


# -- many blocks together ----------------------------------------------------------------------------------------------


def test_covariances_of_one_size_are_decomposed_together_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    kfac, blocks = KFAC(), []
    for k, positions in enumerate((1, 2, 3)):
        each = outer(positions=positions)
        one = Block(f"block{k}", (torch.nn.Parameter(torch.zeros(each.layout)),), each.layout)
        kfac.observe(one, each, 2.0)
        blocks.append(one)
    vector = Block("vector", (torch.nn.Parameter(torch.zeros(3)),), (3,))
    kfac.observe(vector, Vector(draw(5, 3)), 2.0)
    kfac.end_step()
    blocks.append(vector)
    alone = [kfac.operator(one, exponential(0.3)) for one in blocks]
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (calls.append(x.shape), eigh(x))[1])
    with kfac.decomposed(blocks):
        together = [kfac.operator(one, exponential(0.3)) for one in blocks]
    assert len(calls) == 2 and all(len(shape) == 3 and shape[0] == 3 for shape in calls)  # outputs' size and inputs'
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0)
        torch.testing.assert_close(one.right, other.right, rtol=0, atol=0)


def test_a_covariance_that_cannot_be_decomposed_costs_its_own_block_alone() -> None:
    kfac, blocks = KFAC(), []
    for k in range(2):
        each = outer()
        one = Block(f"block{k}", (torch.nn.Parameter(torch.zeros(each.layout)),), each.layout)
        kfac.observe(one, Outer(each.activations * (math.nan if k else 1.0), each.output_grads), 2.0)
        blocks.append(one)
    kfac.end_step()
    with kfac.decomposed(blocks):
        assert bool(kfac.operator(blocks[0], exponential(0.3)).weight.isfinite().all())
        with pytest.raises(RuntimeError):
            kfac.operator(blocks[1], exponential(0.3))
