"""Gradients of entries whose rows an index tells, against the same entries row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ine_callback.capture import GradSample, Lookup, Outer, Vector
from ine_callback.capture.per_sample_gradients import Kernel, Ragged, Windows, of_entries

EXACT = {"rtol": 1e-9, "atol": 1e-11}
N, ROWS = 9, 4


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _kinds(seed: int) -> dict[str, GradSample]:
    ids = torch.randint(5, (N, 3), generator=torch.Generator().manual_seed(seed))
    outer = Outer(_draw(seed, N, 2, 3, 4), _draw(seed + 1, N, 2, 3, 5))
    windows = Windows(_draw(seed, N, 2, 6), _draw(seed + 1, N, 1, 4, 3), kernel=Kernel((3,), (1,), (1,), 1))
    lookup = Lookup(ids, _draw(seed, N, 3, 4), 5)
    kinds = {"outer": outer, "one position": Outer(outer.activations[:, :, :1], outer.output_grads[:, :, :1])}
    kinds |= {"with bias": outer.with_bias(), "windows": windows, "windows with bias": windows.with_bias()}
    return {**kinds, "lookup": lookup, "transposed lookup": lookup.transposed(), "vector": Vector(_draw(seed, N, 6))}


KINDS = list(_kinds(0))
indices = st.lists(st.integers(0, ROWS), min_size=N, max_size=N).map(torch.tensor)  # ROWS: of no row


def _by_row(sample: GradSample, index: Tensor) -> Tensor:
    """The rows' gradients [ROWS, *layout], formed entry by entry."""
    each, out = sample.gradient(slice(None)), torch.zeros(ROWS, *sample.layout).double()
    for gradient, row in zip(each, index.tolist(), strict=True):
        if row < ROWS:
            out[row] += gradient
    return out


@pytest.mark.parametrize("kind", KINDS)
@given(index=indices, seed=st.integers(0, 20))
def test_everything_is_that_of_the_formed_gradients(kind: str, index: Tensor, seed: int) -> None:
    entries = _kinds(seed)[kind]
    found, g = of_entries(entries, index, ROWS), _by_row(entries, index)
    assert found.rows == ROWS and found.layout == entries.layout and found.units == entries.units
    close: Callable[[Tensor, Tensor], None] = lambda a, b: torch.testing.assert_close(a, b, **EXACT)  # noqa: E731
    close(found.gradient(slice(None)), g)
    close(found.gradient(slice(1, 3)), g[1:3])
    close(found.total(), g.sum(0))
    close(found.squared_norms(), g.flatten(1).square().sum(1))
    u, weights = _draw(1, 3, *found.layout), _draw(2, 2, *found.layout).abs()
    close(found.signals(u), torch.einsum("rx,qx->rq", g.flatten(1), u.flatten(1)))
    close(found.norms(weights), torch.einsum("rx,cx->rc", g.flatten(1).square(), weights.flatten(1)))
    by_row = _draw(3, ROWS)
    close(found.weighted(by_row).total(), torch.einsum("r,r...->...", by_row, g))
    two = _draw(4, ROWS, 2)
    close(found.weighted_sums(two), torch.einsum("rq,r...->q...", two, g))
    if isinstance(found, Ragged):
        assert found.positions is None and found.position_signals(u) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("vector", "lookup")])
@given(index=indices)
def test_what_is_made_of_outer_products_keeps_its_rows(kind: str, index: Tensor) -> None:
    entries = _kinds(0)[kind]
    found, g = of_entries(entries, index, ROWS), _by_row(entries, index)
    assert isinstance(found, Outer)
    groups, out, inputs = found.layout
    columns, left = _draw(1, groups, inputs, 3), _draw(2, groups, out, out)
    torch.testing.assert_close(found.compressed(columns).g, (g @ columns).transpose(-1, -2), **EXACT)
    torch.testing.assert_close(found.transposed().gradient(slice(None)), g.transpose(-1, -2), **EXACT)
    right = _draw(3, groups, inputs, inputs)
    for a, b in [(left, right), (None, right), (left, None)]:
        expected = g if a is None else a.transpose(-1, -2) @ g
        expected = expected if b is None else expected @ b
        torch.testing.assert_close(found.rotated(a, b).gradient(slice(None)), expected, **EXACT)


def test_half_precision_widens() -> None:
    outer = Outer(_draw(0, N, 1, 1, 4).bfloat16(), _draw(1, N, 1, 1, 5).bfloat16())
    index = torch.arange(N) % ROWS
    found = of_entries(outer, index, ROWS).wide()
    assert found.dtype == torch.float32 and found.rows == ROWS
    torch.testing.assert_close(found.gradient(slice(None)).double(), _by_row(outer.wide(), index), rtol=1e-5, atol=1e-5)


def test_a_row_may_have_no_entry_and_a_batch_none_at_all() -> None:
    outer = Outer(_draw(0, 0, 1, 1, 4), _draw(1, 0, 1, 1, 5))
    found = of_entries(outer, torch.zeros(0, dtype=torch.int64), ROWS)
    assert not found.signals(_draw(2, 2, *found.layout)).any() and found.squared_norms().shape == (ROWS,)
    two = Outer(_draw(0, 2, 1, 1, 4), _draw(1, 2, 1, 1, 5))
    some = of_entries(two, torch.tensor([2, 2]), ROWS)
    assert some.squared_norms().nonzero().flatten().tolist() == [2]
