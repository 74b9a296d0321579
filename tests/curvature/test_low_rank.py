"""Low-rank directions and sketches against what they stand for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.capture import Block, Lookup, Outer
from ine_callback.capture.per_sample_gradients import Kernel, Windows
from ine_callback.curvature import sketch as sketches
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.low_rank import MIN_RETAINED_VARIANCE, Side, low_rank
from ine_callback.curvature.sketch import (
    MAX_ERROR,
    MAX_MIXTURES,
    MIN_MIXTURES,
    STEEPEST,
    expected_self_influence,
    mixtures,
)
from ine_callback.curvature.spectral import SketchedOperator, SpectralOperator, exponential
from ine_callback.recording.phases import Phase
from ine_callback.scoring import directions
from ine_callback.scoring.directions import CompressedDirection, DirectionSpec, direction_of
from ine_callback.scoring.sign_contrasts import Contrasts, signed_by
from tests.helpers.copies import Copies
from tests.helpers.sides import IN, LEFT, OUT, RIGHT, discount, draw, rows_of, side, sketch


def test_a_direction_of_low_rank_is_retained_exactly() -> None:
    u = draw(2, 1, OUT, 3) @ draw(1, 1, 3, IN)
    basis, inside, retained = low_rank(u, LEFT, RIGHT, 16)
    assert basis.shape[-1] <= 3 and float(retained) >= MIN_RETAINED_VARIANCE
    torch.testing.assert_close(
        low_rank(draw(1, 1, OUT, 1) @ draw(1, 1, 1, IN), LEFT, RIGHT, 16)[2], torch.ones(()).double()
    )
    grad_sample = rows_of(LEFT, RIGHT, 50)
    exact = grad_sample.signals(u)
    found = grad_sample.rotated(None, basis).signals(inside)
    assert float((found - exact).square().mean() / exact.square().mean()) < 2 * (1 - float(retained)) + 1e-12


def test_the_retained_variance_is_that_of_the_signals() -> None:
    steep = side(IN, 3.0, 2)
    u, grad_sample = draw(3, 1, OUT, IN, seed=9), rows_of(LEFT, steep, 20_000)
    basis, inside, retained = low_rank(u, LEFT, steep, 32)
    assert basis.shape[-1] < 20  # of 80: the inputs' covariance falls fast
    exact, found = grad_sample.signals(u), grad_sample.rotated(None, basis).signals(inside)
    lost = float((found - exact).square().mean() / exact.square().mean())
    assert lost == pytest.approx(1 - float(retained), rel=0.1)  # 20,000 rows: some per cent


def test_there_is_no_basis_where_few_dimensions_retain_too_little() -> None:
    flat = Side(torch.ones(1, IN).double(), None)
    assert low_rank(draw(1, 1, OUT, IN), Side(torch.ones(1, OUT).double(), None), flat, 32) is None
    assert low_rank(draw(1, 1, OUT, 20), LEFT, side(20, 3.0, 1), 32) is None  # too small a side to save anything


def test_the_fewer_observations_the_closer_eigenvalues_are_to_their_mean() -> None:
    values = torch.tensor([[1.0, 1.0, 0.0, 0.0]])  # of effective dimension 2
    shrunk = Side.shrunk(values, None, seen=8.0)
    torch.testing.assert_close(shrunk.values, torch.tensor([[0.875, 0.875, 0.125, 0.125]]))
    torch.testing.assert_close(Side.shrunk(values, None, seen=1.0).values, torch.full((1, 4), 0.5))
    torch.testing.assert_close(Side.shrunk(values * 1e30, None, seen=8.0).values, shrunk.values * 1e30)


@pytest.mark.parametrize("positions", [1, 7])
def test_a_sketch_is_unbiased_without_a_discount(positions: int) -> None:
    """D = 1: the mean over draws of the mixtures is every row's squared gradient, twice."""
    grad_sample = rows_of(LEFT, RIGHT, 6, positions)
    found = torch.stack([sketch(0.0, seed).norms(grad_sample) for seed in range(1500)])
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - grad_sample.squared_norms()[:, None]).abs() < 4.5 * error).all()


@pytest.mark.parametrize("exponent", [0.3, 30.0])
def test_a_sketch_is_right_on_average_over_rows(exponent: float) -> None:
    grad_sample, exact = rows_of(LEFT, RIGHT, 4000), discount(LEFT, RIGHT, exponent)
    found, truth = sketch(exponent).norms(grad_sample), exact.norms(grad_sample)
    assert found.mean(0).tolist() == pytest.approx(truth.mean(0).tolist(), rel=0.1)
    assert spearmanr(found[:, 0], truth[:, 0])[0] > 0.85  # one draw of the mixtures; steps average over many


def test_the_steepest_eigenvectors_keep_their_weights() -> None:
    """Rows in the span of the steepest meet no mixture."""
    assert LEFT.vectors is not None and RIGHT.vectors is not None
    delta = draw(5, 1, 1, STEEPEST) @ LEFT.vectors[..., -STEEPEST:].transpose(-1, -2)
    a = draw(5, 1, 1, STEEPEST, seed=3) @ RIGHT.vectors[..., -STEEPEST:].transpose(-1, -2)
    grad_sample = Outer(a, delta)
    torch.testing.assert_close(
        sketch(3.0).norms(grad_sample), discount(LEFT, RIGHT, 3.0).norms(grad_sample), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("strata", "least", "most"), [(sketches.STRATA, 0.0, 0.03), (1, 0.04, 1.0)])
def test_rare_and_frequent_words_keep_their_own_weights(
    strata: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean relative error of rows of one word each, of what sketches have on average: .012, and .062 in one stratum."""
    monkeypatch.setattr(sketches, "STRATA", strata)
    words, few = Side(torch.arange(1, 201).double()[None] ** -1.0, None), side(16, 1.0, 4)
    exact = discount(few, words, 40.0)
    delta = draw(192, 1, 1, 16, seed=7) * few.values.sqrt() @ few.vectors.transpose(-1, -2)
    grad_sample = Outer(torch.eye(200).double()[8:, None, None], delta)
    drawn, found = exact.sketched(), []
    for seed in range(300):
        drawn.draw(torch.Generator().manual_seed(seed))
        found.append(drawn.norms(grad_sample)[:, 0])
    error = (torch.stack(found).mean(0) / exact.norms(grad_sample)[:, 0] - 1).abs().mean()
    assert least <= float(error) < most


def test_a_small_side_is_not_sketched() -> None:
    small = side(2 * (STEEPEST + MIN_MIXTURES) - 1, 1.5, 4)
    found = discount(small, small, 2.0).sketched()
    assert isinstance(found, SketchedOperator) and found.rows is None and found.columns is None
    grad_sample = rows_of(small, small, 5)
    torch.testing.assert_close(
        found.norms(grad_sample), discount(small, small, 2.0).norms(grad_sample), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("positions", [1, 7])
@pytest.mark.parametrize("inputs", [IN, 20])
@pytest.mark.parametrize("queries", [0, 1, 9])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
def test_one_pass_gives_what_two_passes_give(
    positions: int, inputs: int, queries: int, outputs: bool, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "alignment", lambda device: multiple)  # as on a GPU
    right = side(inputs, 4.0, 2)
    block = Block("w", (nn.Parameter(torch.zeros(OUT, inputs).double()),), (1, OUT, inputs), matrix=True)
    u = draw(queries, 1, OUT, inputs, seed=8) if queries else None
    block.outputs = outputs
    spec = DirectionSpec(discount(LEFT, right, 2.0), 1.0, (1.0, 1.0))
    compressed, _ = direction_of(block, Contrasts(4), u, spec, 32, MIN_MIXTURES)
    assert isinstance(compressed, CompressedDirection)
    compressed.draw(1)
    assert compressed._columns.shape[-1] % multiple == 0
    grad_sample = rows_of(LEFT, right, 9, positions)
    seen = grad_sample.transposed() if outputs else grad_sample
    signals, use = compressed.contract(grad_sample)
    own = compressed.self_terms_of([use])
    if u is not None:
        basis = compressed.sketch.right if compressed.in_sketch else compressed.basis
        given = seen if basis is None else seen.rotated(None, basis)
        expected = given.parts(compressed.queries, compressed.contrasts.signs(block, seen.units))
        torch.testing.assert_close(signals, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(own.norms, compressed.sketch.norms(seen), rtol=1e-9, atol=1e-12)
    signed = signed_by(own.unit_energies)
    assert signed[:, 0].eq(1).all() and signed.shape == (9, 5)
    # a block that is used twice: its gradient is the sum
    both = compressed.self_terms_of(
        [use, compressed.contract(replace(grad_sample, output_grads=-3 * grad_sample.output_grads))[1]]
    )
    torch.testing.assert_close(both.norms, 4 * own.norms, rtol=1e-9, atol=1e-12)


def test_a_tied_last_layer_is_contracted_in_few_columns_of_its_outputs() -> None:
    """Its two uses are a product and a lookup; self-influence is that of their sum."""
    entries, width = 1400, 60
    block = Block(
        "w", (nn.Parameter(torch.zeros(entries, width).double()),), (1, entries, width), tied=True, outputs=True
    )
    head = Outer(draw(5, 1, 7, width), draw(5, 1, 7, entries, seed=1))
    table = Lookup(torch.randint(entries, (5, 7)), draw(5, 7, width, seed=2), entries)
    kfac = KFAC()
    for grad_sample in (head, table):
        kfac.observe(block, grad_sample, terms=5.0)
    kfac.end_step()
    u = draw(1, 1, entries, 2, seed=3) @ draw(1, 1, 2, width, seed=4)
    spec = DirectionSpec(kfac.operator(block, exponential(0.2)), 1.0, (1.0, 1.0))
    compressed, retained = direction_of(block, Contrasts(4), u, spec, 32, MIN_MIXTURES)
    assert isinstance(compressed, CompressedDirection) and compressed.basis is not None and retained is not None
    compressed.draw(1)
    (signals, first), (more, second) = compressed.contract(head), compressed.contract(table)
    assert signals is not None and more is not None and compressed.queries is not None
    every = slice(0, 5)
    g = (head.gradient(every) + table.gradient(every)).transpose(-1, -2)  # [b, 1, width, entries]
    by_unit = (g[:, None] * (compressed.queries @ compressed.basis.transpose(-1, -2))).sum(-1).flatten(2)
    signs = compressed.contrasts.signs(block, (1, width))
    torch.testing.assert_close(signals + more, by_unit @ signs.T, rtol=1e-9, atol=1e-9)
    own = compressed.self_terms_of([first, second])
    assert (
        isinstance(compressed.sketch, SketchedOperator)
        and compressed.sketch.left is not None
        and compressed.sketch.right is not None
    )
    seen = (compressed.sketch.left.transpose(-1, -2) @ g @ compressed.sketch.right).square()
    expected = (seen[:, None] * compressed.sketch.weights).flatten(2).sum(2)
    torch.testing.assert_close(own.norms, expected, rtol=1e-9, atol=1e-12)
    # the sides are the partial traces of the Fisher's diagonal, the product of which has its trace
    left, right = spec.discount.sides or (None, None)
    assert left is not None and right is not None and spec.discount.weight is not None
    fisher = -spec.discount.weight.log() / 0.2
    torch.testing.assert_close(left.values.sum() * right.values.sum(), fisher.sum(), rtol=1e-9, atol=0)
    # a D that is the same everywhere needs no eigenbasis
    plain = replace(spec.discount, formed=torch.full_like(fisher, 0.25))
    torch.testing.assert_close(plain._rotated(), plain.weight, rtol=1e-9, atol=0)


def test_a_transposed_lookup_equals_one_hot_inputs() -> None:
    table = Lookup(torch.randint(9, (5, 7)), draw(5, 7, 4), 9)
    lazy = table.transposed()
    formed = Outer(lazy.formed(), lazy.output_grads)
    every = slice(0, 5)
    torch.testing.assert_close(lazy.gradient(every), table.gradient(every).transpose(-1, -2))
    assert lazy.layout == formed.layout == (1, 4, 9)
    signs, columns, weights = draw(3, 4), draw(1, 9, 2), draw(2, 1, 4, 9)
    for queries in (1, 2):
        torch.testing.assert_close(
            lazy.parts(draw(queries, 1, 4, 9), signs), formed.parts(draw(queries, 1, 4, 9), signs)
        )
    torch.testing.assert_close(lazy.unit_energies(signs), formed.unit_energies(signs))
    torch.testing.assert_close(lazy.compressed(columns).g, formed.compressed(columns).g)
    torch.testing.assert_close(lazy.norms(weights), formed.norms(weights))
    torch.testing.assert_close(lazy.total(), formed.total())
    torch.testing.assert_close(lazy.covariances((True, True)), formed.covariances((True, True)))


def test_the_number_of_mixtures_follows_the_self_influence_in_them() -> None:
    left, right = side(OUT, 1.5, 1), side(20, 1.5, 2)  # the right one is too small to be mixed
    weight = torch.rand(1, OUT, 20).double()
    wanted = weight * left.values[..., :, None] * right.values[..., None, :]
    every, mixed = expected_self_influence(weight, left, right).tolist()
    steepest = left.values[0].topk(STEEPEST).indices
    assert every == pytest.approx(float(wanted.sum()))
    assert mixed == pytest.approx(every - float(wanted[0, steepest].sum()))
    assert mixtures(0.0) == MIN_MIXTURES == mixtures(math.nan) and mixtures(1.0) == MAX_MIXTURES
    assert 4 * 0.6**2 / mixtures(0.6) <= MAX_ERROR**2 < 4 * 0.6**2 / (mixtures(0.6) - 8)
    found = discount(side(600, 1.0, 1), side(600, 1.0, 2), 0.0).sketched(104)
    assert isinstance(found, SketchedOperator)
    found.draw(torch.Generator().manual_seed(0))
    assert found.left is not None and found.left.shape == (1, 600, STEEPEST + 104)


def in_half(convolution: bool) -> Outer:
    """Factors as autocast leaves them: an input in float32 or bfloat16, output gradients in bfloat16."""
    if convolution:
        image, delta = draw(6, 5, 12, 12).bfloat16(), draw(6, 1, 100, OUT, seed=1).bfloat16()
        return Windows(image, delta, kernel=Kernel((3, 3), (1, 1), (1, 1), 1)).with_bias()
    return Outer(draw(6, 1, 100, IN).float(), draw(6, 1, 100, OUT, seed=1).bfloat16())


@pytest.mark.parametrize("convolution", [False, True])
def test_bfloat16_is_contracted_without_a_copy_in_float32(convolution: bool) -> None:
    """To some tenths of a per cent of the rows' deviation, of what the same factors give in float32."""
    grad_sample = in_half(convolution)
    _, out, inputs = grad_sample.layout
    sides = [
        Side(one.values[:, -size:].float(), torch.linalg.qr(draw(1, size, size)).Q.float())
        for one, size in ((LEFT, out), (RIGHT, inputs))
    ]
    values = sides[0].values[..., :, None] * sides[1].values[..., None, :]
    spec = DirectionSpec(SpectralOperator(torch.exp(-values), (sides[0], sides[1])), 1.0, (1.0, 1.0))
    block = Block("w", (nn.Parameter(torch.zeros(out, inputs)),), grad_sample.layout, matrix=True)
    u = (draw(1, 1, out, 3, seed=7) @ draw(1, 1, 3, inputs, seed=8)).float()
    compressed, _ = direction_of(block, Contrasts(4), u, spec, 32, MIN_MIXTURES)
    assert isinstance(compressed, CompressedDirection)
    compressed.draw(1)
    with Copies() as seen:
        signals, use = compressed.contract(grad_sample)
        own = compressed.self_terms_of([use])
    assert seen.largest < grad_sample.output_grads.numel()
    expected, expected_use = compressed.contract(grad_sample.wide())
    expected_own = compressed.self_terms_of([expected_use])
    assert signals is not None and expected is not None
    assert signals.dtype == own.norms.dtype == torch.float32
    assert float((signals - expected).abs().max()) < 0.01 * float(expected[..., 0].std())
    torch.testing.assert_close(own.norms, expected_own.norms, rtol=5e-3, atol=0)
    left, right = grad_sample.covariances((True, True))
    wide_left, wide_right = grad_sample.wide().covariances((True, True))
    assert torch.equal(left, wide_left) and torch.equal(right, wide_right)


@pytest.mark.parametrize("queries", [0, 1])
def test_a_small_diagonal_side_is_contracted_exactly(queries: int) -> None:
    """``max_dim`` below the size of a sketch leaves diagonal covariances, contracted exactly."""
    right = Side(RIGHT.values[:, -40:], None)
    block = Block("w", (nn.Parameter(torch.zeros(OUT, 40).double()),), (1, OUT, 40), matrix=True)
    u = draw(queries, 1, OUT, 40, seed=8) if queries else None
    found, _ = direction_of(
        block, Contrasts(4), u, DirectionSpec(discount(LEFT, right, 2.0), 1.0, (1.0, 1.0)), 1, MIN_MIXTURES
    )
    found.draw(1)
    grad_sample = Outer(draw(9, 1, 7, 40), draw(9, 1, 7, OUT, seed=1))
    signals, use = found.contract(grad_sample)
    own = found.self_terms_of([use])
    assert own.norms.shape == (9, 2) and bool(own.norms.isfinite().all())
    if u is not None:
        assert signals is not None
        torch.testing.assert_close(signals[..., 0], grad_sample.signals(u), rtol=1e-9, atol=1e-12)


# ---- in a training ----


def recorded(rank: int | None, epochs: int = 8) -> Recorder:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    queries = {"val": (x[600:900], y[600:900]), "self": "self"}
    recorder = Recorder(
        model, optimizer, 600, queries, loss, rank=rank, total_steps=12 * epochs, on_error="raise", reservoir=100
    )
    with recorder:
        for _ in range(epochs):
            for rows in torch.randperm(600).split(50):
                with recorder.batch(rows):
                    value = loss(model, (x[rows], y[rows]))
                    recorder.see(value)
                    value.backward()
                optimizer.step()
                optimizer.zero_grad()
    return recorder


def test_the_default_scores_rank_like_the_exact_ones() -> None:
    """Spearman of at least .98."""
    default, exact = recorded(32), recorded(None)
    assert (
        default.signals.retained_variance is not None
        and float(default.signals.retained_variance) >= MIN_RETAINED_VARIANCE
        and exact.signals.retained_variance is None
    )
    a, b = default.report().scores, exact.report().scores
    for k in range(2):
        assert spearmanr(a.mu[:, k], b.mu[:, k])[0] > 0.98
    assert not np.array_equal(a.mu, b.mu)


def test_refreshes_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    refreshed: list[int] = []
    recorder = recorded(None, epochs=0)
    recorder.start()
    monkeypatch.setattr(recorder.signals, "refresh", lambda *_: refreshed.append(recorder.steps))
    recorder.guard.phase = Phase.RECORDING
    recorder.coverage._verified.update(recorder.module.parameters())
    recorder.signals.table.vector(next(recorder.module.parameters()))  # something to refresh
    for recorder.guard.steps in range(400):
        recorder._passes.prepare_step(torch.arange(2), None)
        if refreshed and refreshed[-1] == recorder.steps:
            assert recorder._steps.updates.refreshed_at == recorder.steps
    recorder.stop()
    assert refreshed == [20, 40, 60, 80, 100, 120, 140, 160, 180, 202, 227, 255, 286, 321, 361]
