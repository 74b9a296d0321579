"""Per-sample gradients against their definitions: covariances, chunks, joins, lookups as one-hot products; blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ine_callback.capture import Block, BlockTable, GradSample, Lookup, Outer, Vector
from ine_callback.capture.per_sample_gradients import base
from tests.helpers.copies import Copies

EXACT = {"rtol": 1e-10, "atol": 1e-12}
sizes = st.integers(1, 4)


def outer(rows: int, groups: int, positions: int, out: int, inputs: int, seed: int = 0) -> Outer:
    draw = torch.Generator().manual_seed(seed)
    return Outer(
        torch.randn(rows, groups, positions, inputs, dtype=torch.float64, generator=draw),
        torch.randn(rows, groups, positions, out, dtype=torch.float64, generator=draw),
    )


def lookup(rows: int, positions: int, entries: int, width: int, seed: int = 0) -> Lookup:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(entries, (rows, positions), generator=draw)
    return Lookup(ids, torch.randn(rows, positions, width, dtype=torch.float64, generator=draw), entries)


def one_hot(grad_sample: Lookup) -> Outer:
    """The same gradients as products of a one-hot vector and the output gradient."""
    hot = torch.nn.functional.one_hot(grad_sample.ids, grad_sample.entries).double()
    return Outer(grad_sample.output_grads[:, None], hot[:, None])


@given(rows=sizes, groups=sizes, positions=sizes, out=sizes, inputs=sizes, seed=st.integers(0, 99))
def test_outer_gradients_and_covariances_are_sums_over_positions(
    rows: int, groups: int, positions: int, out: int, inputs: int, seed: int
) -> None:
    grad_sample = outer(rows, groups, positions, out, inputs, seed)
    g = torch.zeros(rows, *grad_sample.layout, dtype=torch.float64)
    left = torch.zeros(groups, out, out, dtype=torch.float64)
    right = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    for i in range(rows):
        for k in range(groups):
            for p in range(positions):
                a, delta = grad_sample.activations[i, k, p], grad_sample.output_grads[i, k, p]
                g[i, k] += torch.outer(delta, a)
                left[k] += torch.outer(delta, delta)
                right[k] += torch.outer(a, a) / (rows * positions)
    torch.testing.assert_close(grad_sample.gradient(slice(0, rows)), g, **EXACT)
    for full in [(True, True), (True, False), (False, True), (False, False)]:
        found = grad_sample.covariances(full)
        for covariance, truth, is_full in zip(found, (left, right), full, strict=True):
            torch.testing.assert_close(covariance, truth if is_full else truth.diagonal(dim1=1, dim2=2), **EXACT)


@given(rows=sizes, positions=st.integers(1, 5), entries=sizes, width=sizes, seed=st.integers(0, 99))
def test_lookup_is_the_outer_product_with_one_hot_vectors(
    rows: int, positions: int, entries: int, width: int, seed: int
) -> None:
    grad_sample = lookup(rows, positions, entries, width, seed)
    product = one_hot(grad_sample)
    everything = slice(0, rows)
    torch.testing.assert_close(grad_sample.gradient(everything), product.gradient(everything), **EXACT)
    torch.testing.assert_close(grad_sample.total(), product.total(), **EXACT)
    u = torch.randn(3, *grad_sample.layout, dtype=torch.float64)
    torch.testing.assert_close(grad_sample.signals(u), product.signals(u), **EXACT)
    weights = torch.rand(2, *grad_sample.layout, dtype=torch.float64)
    torch.testing.assert_close(grad_sample.norms(weights), product.norms(weights), **EXACT)
    torch.testing.assert_close(grad_sample.squared_norms(), product.squared_norms(), **EXACT)
    for full in (True, False):
        found, truth = grad_sample.covariances((False, full)), product.covariances((False, full))
        # one averages the left side, the other the right side: only the product is defined
        torch.testing.assert_close(
            torch.kron(found[0].flatten(), found[1].flatten()),
            torch.kron(truth[0].flatten(), truth[1].flatten()),
            **EXACT,
        )


def test_vector_covariances_are_summed_squares_and_one() -> None:
    g = torch.randn(5, 3, dtype=torch.float64)
    left, right = Vector(g).covariances((True, True))
    torch.testing.assert_close(left, sum(row.square() for row in g), **EXACT)
    assert right == 1


@pytest.mark.parametrize(
    "grad_sample", [outer(5, 2, 3, 2, 4), outer(5, 1, 1, 3, 4), lookup(5, 3, 4, 2), Vector(torch.randn(5, 3).double())]
)
def test_chunks_of_rows_give_the_results_of_one_pass(grad_sample: GradSample, monkeypatch: pytest.MonkeyPatch) -> None:
    u, weights = torch.randn(3, *grad_sample.layout).double(), torch.rand(2, *grad_sample.layout).double()
    whole = grad_sample.signals(u), grad_sample.norms(weights), grad_sample.squared_norms()
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", weights.numel() + 1)
    assert len(list(base.row_chunks(5, weights[0].numel()))) == 3
    for a, b in zip(
        whole, (grad_sample.signals(u), grad_sample.norms(weights), grad_sample.squared_norms()), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


@given(rows=st.integers(1, 50), elements=st.integers(0, 10**9))
def test_row_chunks_cover_every_row_once(rows: int, elements: int) -> None:
    chunks = list(base.row_chunks(rows, elements))
    assert [k for c in chunks for k in range(rows)[c]] == list(range(rows))
    assert all((c.stop - c.start) * elements <= base.CHUNK_ELEMENTS or c.stop - c.start == 1 for c in chunks)


def test_lookup_has_no_left_basis() -> None:
    with pytest.raises(ValueError, match=r"Lookup\.rotated"):
        lookup(2, 2, 3, 2).rotated(torch.eye(3)[None], None)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(4, 6, 3, groups=2)])
def test_a_blocks_layout_joins_weight_and_bias_as_its_grad_sample_does(layer: nn.Module) -> None:
    groups = getattr(layer, "groups", 1)
    out, inputs = layer.weight.shape[0] // groups, layer.weight[0].numel()
    weight = outer(5, groups, 3, out, inputs)
    bias = Outer(torch.ones(5, groups, 3, 1, dtype=torch.float64), weight.output_grads)
    table = BlockTable(nn.Sequential(layer))
    ((block, joined),) = table.sort(layer, {"weight": weight, "bias": bias})
    assert block.name == "0.weight" and block.parameters == (layer.weight, layer.bias)
    assert block.elements == layer.weight.numel() + layer.bias.numel()
    shapes = [torch.randn(4, *p.shape, dtype=torch.float64) for p in block.parameters]
    signals = joined.signals(block.to_layout(shapes))
    apart = weight.signals(shapes[0].reshape(4, *weight.layout)) + bias.signals(shapes[1].reshape(4, *bias.layout))
    torch.testing.assert_close(signals, apart, **EXACT)


def test_tied_parameters_get_blocks_of_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embedding.weight

    model = Tied()
    table = BlockTable(model)
    pairs = table.sort(model.head, {"weight": outer(2, 1, 1, 5, 3), "bias": outer(2, 1, 1, 5, 1)})
    pairs += table.sort(model.embedding, {"weight": lookup(2, 3, 5, 3)})
    assert [block.name for block, _ in pairs] == ["embedding.weight", "head.bias", "embedding.weight"]
    assert pairs[0][0] is pairs[2][0] and pairs[0][0].tied and not pairs[1][0].tied


def test_a_dropped_block_is_refused_until_the_fallback_takes_its_parameter() -> None:
    layer = nn.Linear(3, 2)
    table = BlockTable(layer)
    grad_samples = {"weight": outer(2, 1, 1, 2, 3), "bias": outer(2, 1, 1, 2, 1)}
    ((block, _),) = table.sort(layer, grad_samples)
    table.drop(block)
    assert table.sort(layer, grad_samples) == [] and table.captured() == set()
    slow: Block = table.vector(layer.weight)
    assert slow.layout == (6,) and list(table) == [slow] and table.captured() == set()  # by no layer function


def test_gradient_of_a_slice_is_a_slice_of_the_gradient() -> None:
    for grad_sample in (outer(5, 2, 3, 2, 4), lookup(5, 3, 4, 2), Vector(torch.randn(5, 3))):
        g: Tensor = grad_sample.gradient(slice(0, 5))
        assert torch.equal(grad_sample.gradient(slice(2, 4)), g[2:4])


@pytest.mark.parametrize(
    "entries", [outer(6, 2, 3, 2, 4), outer(6, 1, 1, 3, 4), lookup(6, 3, 4, 2), Vector(torch.randn(6, 3).double())]
)
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("consecutive", [False, True])
def test_entries_are_added_up_by_row(entries: GradSample, views: int, consecutive: bool) -> None:
    each = entries.gradient(slice(None))
    wanted = each.unflatten(0, (-1, views)).sum(1) if consecutive else each.unflatten(0, (views, -1)).sum(0)
    together, split = entries.by_row(views, consecutive), entries.split(views, consecutive)
    assert together is not None and together.rows == 6 // views and len(split) == views
    torch.testing.assert_close(together.gradient(slice(None)), wanted, **EXACT)
    torch.testing.assert_close(sum(one.gradient(slice(None)) for one in split), wanted, **EXACT)


def test_bfloat16_factors_are_multiplied_as_they_are_and_summed_in_float32() -> None:
    """Over 400 positions sums in bfloat16 would be wrong by several per cent of the largest, products round by .4 %."""
    g = torch.Generator().manual_seed(0)
    activations, output_grads = (torch.randn(4, 1, 400, k, generator=g) + 0.5 for k in (600, 24))
    half = Outer(activations.bfloat16(), output_grads.bfloat16())
    direction, weights = torch.randn(1, 1, 24, 600, generator=g), torch.ones(2, 24)
    weights[1, ::2] = -1
    exact = half.wide().parts(direction, weights)
    found = half.parts(direction, weights)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max() / exact.abs().max()) < 4e-3
    with Copies() as made:
        half.parts(direction, weights)
    assert made.largest <= 4 * 24 * 2  # the sums over positions alone
