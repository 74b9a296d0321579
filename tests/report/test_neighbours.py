"""Neighbours, near duplicates and weak rows, by vectors that are known."""

from __future__ import annotations

import numpy as np
import pytest

from ine_callback.errors import InfluenceError
from ine_callback.report import example_report
from ine_callback.report.neighbours import near_duplicates, neighbours, weak_rows
from ine_callback.report.stored_vectors import StoredBlock, StoredVectors

ROWS, NUMBERS = 3000, 24  # more than a block of rows


@pytest.fixture(scope="module")
def store() -> StoredVectors:
    """Random rows; 7, 2500 and 2999 are one row at three sizes, 5 is its opposite, 9 was not seen, 11 is weak."""
    rows = np.random.default_rng(0).normal(size=(ROWS, NUMBERS)).astype(np.float32)
    rows[[2500, 2999, 5]] = rows[7] * np.array([[1.0], [0.5], [-2.0]])
    seen = np.arange(ROWS) != 9
    rows[9] = 0
    scale = np.where(np.arange(ROWS) == 11, 1e-3, 1.0).astype(np.float32)
    block = StoredBlock(("w",), (NUMBERS,), np.arange(NUMBERS))
    return StoredVectors(rows, scale, (block,), np.eye(NUMBERS, dtype=np.float32), np.ones(NUMBERS, np.float32), seen)


def test_the_nearest_rows_are_those_of_the_largest_cosine(store: StoredVectors) -> None:
    found = neighbours(store, 7, 5)
    assert set(found.rows[:2]) == {2500, 2999} and 5 not in found.rows
    np.testing.assert_allclose(found.cosines[:2], 1.0, atol=1e-6)
    unit = store.rows / np.maximum(np.linalg.norm(store.rows, axis=1, keepdims=True), 1e-12)
    cosines = unit.astype(float) @ unit[7]
    cosines[[7, 9]] = -2
    np.testing.assert_allclose(found.cosines, np.sort(cosines)[::-1][:5], atol=1e-6)
    assert len(neighbours(store, 7, 10 * ROWS).rows) == ROWS - 2  # neither itself nor what was never seen


def test_duplicates_are_found_across_blocks_and_weak_rows_by_their_size(store: StoredVectors) -> None:
    assert [group.tolist() for group in near_duplicates(store, 0.98)] == [[7, 2500, 2999]]
    assert weak_rows(store, 0.01).tolist() == [11]


def test_what_cannot_be_told_is_refused(store: StoredVectors) -> None:
    with pytest.raises(InfluenceError, match="row 9 has no vector"):
        neighbours(store, 9)
    with pytest.raises(InfluenceError, match="k=0 must be at least 1"):
        neighbours(store, 7, 0)
    with pytest.raises(InfluenceError, match="cosine=2 must be"):
        near_duplicates(store, 2)
    with pytest.raises(InfluenceError, match="the report has no gradient store"):
        example_report().neighbours(3)


def test_products_are_those_of_the_stored_numbers(store: StoredVectors) -> None:
    queries = np.random.default_rng(1).normal(size=(3, NUMBERS))
    expected = (store.rows.astype(float) * store.scale[:, None]) @ queries.T
    np.testing.assert_allclose(store.products(queries), expected, rtol=1e-5, atol=1e-5)
