"""Neighbours by FAISS are those of comparing all rows; without FAISS the remedy is named."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ine_callback.errors import InfluenceError
from ine_callback.report import neighbour_index
from ine_callback.report.neighbour_index import NeighbourIndex
from ine_callback.report.neighbours import nearest, neighbours
from tests.helpers.report.pages import report_of, store_of, stored

ROWS, NUMBERS = 3000, 24


def clusters() -> np.ndarray:
    """Rows around 100 centres, as gradients of classes and their kinds are."""
    random = np.random.default_rng(0)
    return random.standard_normal((100, NUMBERS))[random.integers(100, size=ROWS)] + 0.7 * random.standard_normal(
        (ROWS, NUMBERS)
    )


def test_up_to_many_rows_the_index_is_exact() -> None:
    pytest.importorskip("faiss", reason="needs the extra faiss")
    store = store_of(clusters(), np.arange(ROWS) != 9)
    index, which = NeighbourIndex(store), np.array([0, 7, 2999])
    for found, expected in zip(index.nearest(which, 12), nearest(store, which, 12), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert index.neighbours(7, 5).rows.tolist() == neighbours(store, 7, 5).rows.tolist()
    with pytest.raises(InfluenceError, match="row 9 has no vector"):
        index.neighbours(9)
    assert stored(report_of()).neighbour_index().neighbours(20, 1).rows.tolist() == [120]


def test_of_more_rows_it_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="needs the extra faiss")
    monkeypatch.setattr(neighbour_index, "EXACT", 1000)
    store, which = store_of(clusters()), np.arange(0, ROWS, 10)
    rows, cosines = NeighbourIndex(store).nearest(which, 10)
    expected, _ = nearest(store, which, 10)
    shared = [len(set(one) & set(other)) for one, other in zip(rows.tolist(), expected.tolist(), strict=True)]
    assert np.mean(shared) > 9.5
    exact = np.einsum("nk,njk->nj", store.unit_rows(which), store.unit_rows(rows.ravel()).reshape(*rows.shape, -1))
    np.testing.assert_allclose(cosines, exact, atol=1e-6)
    few = NeighbourIndex(store, probes=1).nearest(which, 10)[0]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(few.tolist(), expected.tolist(), strict=True)]) < np.mean(
        shared
    )


def test_without_faiss_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'neighbour_index needs faiss; run: pip install "ine_callback\[faiss\]"'):
        stored(report_of()).neighbour_index()
