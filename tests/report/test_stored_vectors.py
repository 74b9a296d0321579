"""What a store's numbers mean: two parts of a row, each weighed by what it spreads a query by."""

from __future__ import annotations

import numpy as np

from ine_callback.report.stored_vectors import StoredBlock, StoredVectors, halves, moments


def test_both_parts_of_a_score_have_the_standard_deviation_one_over_the_rows() -> None:
    rng = np.random.default_rng(0)
    run, passed = rng.normal(size=(40, 6)), 30 * rng.normal(size=(40, 6)) * [1, 2, 3, 4, 5, 6] + 1
    _, _, directions = np.linalg.svd(np.concatenate([run, passed], 1), full_matrices=False)
    rows = np.concatenate([run, passed], 1) @ directions.T  # all twelve components: exact
    blocks = StoredBlock(("a",), (4,), np.arange(4)), StoredBlock(("b",), (2,), np.arange(2))
    ones = np.ones(40, dtype=np.float32)
    store = StoredVectors(
        (rows / 2).astype(np.float32),
        2 * ones,
        blocks,
        directions.T.astype(np.float32),
        np.ones(6, np.float32),
        ones > 0,
    )
    assert np.allclose(store.products(store.of_query(np.eye(6))), run + passed, atol=1e-4)
    weighed = StoredVectors(**vars(store) | {"moments": moments(store)})
    queries = rng.normal(size=(3, 6))
    a, b = run @ queries.T, passed @ queries.T
    expected = a / a.std(0) + b / b.std(0)
    np.testing.assert_allclose(weighed.products(weighed.of_query(queries)), expected, atol=1e-4)
    np.testing.assert_allclose(weighed.of_query_by_layer(queries).sum(1), weighed.of_query(queries), atol=1e-6)


def test_components_come_back_from_disk_as_they_were() -> None:
    once, unit = halves(np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32))
    kept = once.astype(np.float32) * unit
    again, same = halves(kept)
    assert same == unit
    np.testing.assert_array_equal(again, once)
