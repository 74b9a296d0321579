"""The reservoir's discount against dense linear algebra, alone and through the recorder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ine_callback.curvature.gradient_sample as module
from ine_callback import Recorder
from ine_callback.capture import Block, GradSample, Lookup, Outer, Vector
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import InfluenceError
from ine_callback.recording.setup import gradient_sample
from tests.helpers.factors import block, draw, outer
from tests.helpers.oracle import Keep, cross_entropy, mlp

ALONE = Lockstep(torch.device("cpu"), alone=True)
CLOSE = {"rtol": 2e-4, "atol": 1e-5}  # gradients are kept in float32


def dense(basis: Tensor, held: Tensor, v: Tensor) -> Tensor:
    """D v for rows' gradients [m, P] and v [Q, P] from the definition: orthonormal directions, measured elsewhere."""
    values, vectors = torch.linalg.eigh(basis.T @ basis)
    u = vectors[:, values > 1e-7 * values[-1]]
    curved = (held @ u).square().mean(0)
    return v - v @ u @ torch.diag(1 - torch.exp(-curved)) @ u.T


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that span, three of every four, and those that measure."""
    last = torch.arange(len(rows)) % 4 == 3
    return rows[~last], rows[last]


def filled(grad_samples: dict[Block, GradSample], rows: int = 100, terms: float = 1.0) -> tuple[GradientSample, Tensor]:
    """A sample that stores one whole batch, and the order in which it stores the batch's rows."""
    size = next(iter(grad_samples.values())).rows
    reservoir = GradientSample(rows)
    reservoir.open(list(grad_samples.items()), ALONE)
    reservoir.select(size, terms, size)
    for own, grad_sample in grad_samples.items():
        reservoir.observe(own, grad_sample)
    reservoir.commit()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return reservoir, order


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small reservoirs count in these tests."""
    monkeypatch.setattr(module, "MIN_ROWS", 2)


def test_discount_equals_the_dense_form_over_layers_of_every_kind(few: None) -> None:
    size, terms = 8, 3.0
    made = [outer(size), outer(size, groups=2), outer(size, positions=3), Vector(draw(size, 4))]
    grad_samples = {block(grad_sample): grad_sample for grad_sample in made}
    reservoir, order = filled(grad_samples, terms=terms)
    exponents = {own: (0.02 * (k + 1), 0.1 * k) for k, own in enumerate(grad_samples)}
    v = {own: draw(2, *own.layout) for own in grad_samples}
    rows, queries = [], []
    for own, grad_sample in grad_samples.items():
        root = exponents[own][0] ** 0.5
        rows.append(root * (terms * size) ** 0.5 * grad_sample.gradient(slice(0, size)).flatten(1)[order])
        queries.append(root * v[own].flatten(1))
    together = torch.cat(rows, 1)
    expected = dense(*split(together), torch.cat(queries, 1)).split([q.shape[1] for q in queries], 1)
    found = reservoir.apply(v, exponents, ALONE)
    for own, part in zip(grad_samples, expected, strict=True):
        exponent, decay = exponents[own]
        torch.testing.assert_close(
            found[own].flatten(1), part / exponent**0.5 * torch.exp(torch.tensor(-decay)), **CLOSE
        )


def test_without_remaining_learning_rate_directions_are_unchanged(few: None) -> None:
    grad_sample = outer(6)
    own = block(grad_sample)
    v = draw(3, *own.layout)
    torch.testing.assert_close(filled({own: grad_sample})[0].apply({own: v}, {own: (0.0, 0.0)}, ALONE)[own], v, **CLOSE)


def test_recorded_signals_average_both_discounts(few: None) -> None:
    """U = (K-FAC's + the reservoir's) / 2, the latter from a loop over rows."""
    model, b, lr, total = mlp().double(), 8, 0.3, 6
    x, y = draw(b, 4), torch.randint(3, (b,))
    query = draw(3, 4), torch.randint(3, (3,))
    parameters = list(model.parameters())

    def flat(batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model, batch), parameters)])

    rows = torch.stack([flat((x[k : k + 1], y[k : k + 1])) for k in range(b)])
    v = flat(query)[None]
    order = torch.randperm(b, generator=torch.Generator().manual_seed(0))
    kept = rows[order] * (lr * (total - 1)) ** 0.5
    u = dense(*split(kept), v)
    state = {k: p.clone() for k, p in model.state_dict().items()}
    found = {}
    for reservoir in (0, 100):
        model.load_state_dict(state)
        sgd, keep = torch.optim.SGD(model.parameters(), lr=lr), Keep()
        recorder = Recorder(
            model, sgd, b, {"val": query}, cross_entropy, [keep], total, reservoir=reservoir, on_error="raise"
        )
        with recorder:
            with recorder.batch(torch.arange(b), (x, y)):
                cross_entropy(model, (x, y)).backward()
            sgd.step()
            sgd.zero_grad()
        found[reservoir] = keep.steps[0][1]
    torch.testing.assert_close(found[100], (found[0] + rows @ u.T / b) / 2, **CLOSE)
    assert (found[100] - found[0]).abs().max() > 1e-3


def test_rows_are_a_uniform_sample_of_those_seen() -> None:
    """After 40 batches every batch has its share of the places: a binomial count, four standard deviations wide."""
    grad_sample = Vector(draw(50, 1))
    own = block(grad_sample)
    reservoir = GradientSample(400)
    reservoir.open([(own, grad_sample)], ALONE)
    for batch in range(40):
        reservoir.select(50, 1.0, 1)
        reservoir.observe(own, Vector(torch.full((50, 1), float(batch))))
        reservoir.commit()
    counts = reservoir._stored[own].right.flatten().long().bincount(minlength=40)
    assert int(counts.sum()) == 400
    assert abs(float(counts[:20].sum()) - 200) < 4 * 10
    assert int(counts.max()) < 10 + 4 * 3.2


def test_a_block_that_a_batch_does_not_use_has_zero_gradients_there(few: None) -> None:
    one, two = Vector(draw(4, 2)), Vector(draw(4, 3))
    reservoir, _ = filled({block(one): one, block(two): two}, rows=4)
    first, second = reservoir._stored
    reservoir._seen = 4
    reservoir.select(4, 1.0, 1)
    reservoir.observe(first, Vector(torch.ones(4, 2)))
    reservoir.commit()
    replaced = (reservoir._stored[first].right == 1).all(1)
    assert 0 < int(replaced.sum()) < 4
    assert (reservoir._stored[second].right[replaced] == 0).all()


def test_reused_blocks_and_embeddings_are_left_to_kfac(few: None) -> None:
    one, table = outer(4), Lookup(torch.randint(4, (4, 3)), draw(4, 3, 2), 4)
    own, words = block(one), block(table)
    reservoir = GradientSample(8)
    reservoir.open([(own, one), (words, table)], ALONE)
    reservoir.select(4, 1.0, 4)
    for _ in range(2):
        reservoir.observe(own, one)
    reservoir.observe(words, table)
    reservoir.commit()
    assert reservoir.apply({own: draw(1, *own.layout), words: draw(1, *words.layout)}, {}, ALONE) == {}


def test_gradients_too_large_to_store_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    grad_sample = Outer(draw(4, 1, 1, 9), draw(4, 1, 1, 9))
    reservoir = GradientSample(100)
    reservoir.open([(block(grad_sample), grad_sample)], ALONE)
    assert reservoir.rows == 0 and "K-FAC" in reservoir.note


@pytest.mark.parametrize(("size", "rows", "stored"), [(800, 1000, 0), (800, None, 0), (800, 90, 100), (150, 1000, 100)])
def test_half_of_a_sample_or_all_rows_must_fit(
    size: int, rows: int | None, stored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Outer(draw(4, 1, 2, 9), draw(4, 1, 2, 9))  # of several positions: a row's gradient is stored as it is
    monkeypatch.setattr(module, "MAX_BYTES", 4 * 100 * 81)
    sample = gradient_sample(size, rows)
    sample.open([(block(whole), whole)], ALONE)
    assert sample.rows == stored and bool(sample.note) == (stored == 0)


@pytest.mark.parametrize("rows", [-1, 2.5])
def test_a_size_that_is_not_a_count_is_refused(rows: int) -> None:
    with pytest.raises(InfluenceError, match=f"reservoir={rows}"):
        GradientSample(rows)
