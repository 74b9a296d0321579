"""Numbers of few bits: what is packed comes back, by NumPy and by torch, and products are those of float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ine_callback.integrations import stored_products
from ine_callback.recording.store.pack import packed_numbers
from ine_callback.report import stored_vectors
from ine_callback.report.bands import Band, long, packed, planes, short, slices, turned
from ine_callback.report.neighbours import near_duplicates, nearest
from ine_callback.report.stored_vectors import StoredBlock, StoredVectors
from ine_callback.report.weak_groups import grouped

CPU = torch.device("cpu")


@st.composite
def some_bands(draw: st.DrawFn) -> tuple[Band, ...]:
    """Up to four bands, of any widths in any order."""
    widths = draw(st.lists(st.sampled_from([8, 4, 2]), min_size=1, max_size=4))
    return tuple(Band(width, draw(st.integers(1, 6)) * 8 // width) for width in widths)


def store_of(bands: tuple[Band, ...], rows: int, seed: int = 0) -> StoredVectors:
    """A store of random bytes and steps; the second row was never observed."""
    rng, k = np.random.default_rng(seed), sum(band.count for band in bands)
    codes = rng.integers(-128, 128, (rows, sum(band.size for band in bands)), dtype=np.int8)
    scale = long(short(rng.random((rows, len(bands)), dtype=np.float32)))
    seen = np.arange(rows) != 1
    scale[~seen] = 0
    block, one = StoredBlock(("w",), (k,), np.arange(k)), np.ones(k, np.float32)
    return StoredVectors(codes, scale, (block,), np.eye(k, dtype=np.float32), one, seen, bands=bands)


def explicit(store: StoredVectors) -> np.ndarray:
    """Components' numbers [N, k] in float64, bit by bit."""
    out, place = [], 0
    for k, band in enumerate(store.bands):
        octets = store.rows[:, place : place + band.size].view(np.uint8)
        bits = np.unpackbits(octets[..., None], axis=2).astype(int)  # the highest first
        for at in range(8 // band.width):
            each = bits[..., at * band.width : (at + 1) * band.width] @ (1 << np.arange(band.width)[::-1])
            code = np.where(each >= 2 ** (band.width - 1), each - 2**band.width, each)
            out.append((code + 0.5) * store.scale[:, k, None].astype(float))
        place += band.size
    return turned(np.concatenate(out, 1), store.bands, back=True)


@settings(max_examples=60, deadline=None)
@given(some_bands(), st.integers(0, 5), st.integers(0, 99))
def test_codes_come_back_by_numpy_and_by_torch(bands: tuple[Band, ...], rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    halves = np.repeat([2 ** (band.width - 1) for band in bands], [band.count for band in bands])
    codes = rng.integers(-halves, halves, (rows, len(halves))).astype(np.int8)
    once = packed(codes, bands)
    assert once.shape == (rows, sum(band.size for band in bands)) and once.dtype == np.int8
    for there in (once, torch.from_numpy(once)):
        again = np.full_like(codes, 99)
        for which, found in planes(there, bands):
            again[:, which] = np.asarray(found)
        np.testing.assert_array_equal(again, codes)


@settings(max_examples=40, deadline=None)
@given(some_bands(), st.integers(2, 40), st.integers(1, 4), st.integers(0, 99))
def test_products_are_those_of_numbers_unpacked_one_by_one(
    bands: tuple[Band, ...], rows: int, queries: int, seed: int
) -> None:
    store = store_of(bands, rows, seed)
    asked = np.random.default_rng(seed).normal(size=(queries, store.dimensions))
    exact = explicit(store) @ asked.T
    for found in (store.products(asked), stored_products.products(store, asked, CPU)):
        np.testing.assert_allclose(found, exact, atol=2e-5 * max(1, np.abs(exact).max()))
        assert not found[1].any()
    components = turned(store.numbers() * store.size[:, None], bands, back=True)
    np.testing.assert_allclose(components, explicit(store), atol=1e-5 * np.abs(components).max())


@settings(max_examples=40, deadline=None)
@given(some_bands(), st.sampled_from([np.float32, np.float64]))
def test_turning_is_orthogonal_and_stays_within_a_band(bands: tuple[Band, ...], dtype: type) -> None:
    k = sum(band.count for band in bands)
    there = turned(np.eye(k, dtype=dtype), bands)
    assert there.dtype == dtype
    np.testing.assert_allclose(there @ there.T, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(turned(there, bands, back=True), np.eye(k), atol=1e-5)
    for which, _ in slices(bands):
        there[which, which] = 0
    assert not there.any()


def test_steps_are_rounded_up_to_what_is_on_disk() -> None:
    steps = (10 ** np.random.default_rng(0).uniform(-30, 30, 1000)).astype(np.float32)
    once = long(short(steps))
    assert (once >= steps).all() and (once <= steps * (1 + 2**-7)).all()
    np.testing.assert_array_equal(long(short(once)), once)
    assert long(short(np.zeros(1, np.float32))) == 0


@pytest.mark.parametrize("wrong", [(3, 8), (4, 3), (2, 6), (8, 0), (8, -1)])
def test_there_are_no_bands_of_other_widths_or_of_parts_of_bytes(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no band has"):
        Band(*wrong)


def test_a_store_comes_back_from_disk(tmp_path: Path) -> None:
    store = store_of((Band(8, 3), Band(4, 6), Band(2, 8)), 20)
    stored_vectors.write(store, tmp_path)
    again = stored_vectors.load(tmp_path)
    assert again is not None and again.bands == store.bands and isinstance(again.rows, np.memmap)
    for name in ("rows", "scale", "components", "seen"):
        np.testing.assert_array_equal(getattr(again, name), getattr(store, name), err_msg=name)
    queries = np.random.default_rng(1).normal(size=(2, store.dimensions))
    np.testing.assert_array_equal(again.products(queries), store.products(queries))


def test_neighbours_and_groups_know_numbers_in_bands() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(300, 120)) * np.arange(1, 121.0) ** -0.5).astype(np.float32)
    values[200:203] = values[7] * np.array([[1.0], [0.5], [3.0]])
    values[9] = 0
    plain = store_of((Band(8, 120),), 300)
    plain = replace(plain, rows=values, scale=np.ones(300, np.float32), bands=(), seen=np.arange(300) != 9)
    bands = (Band(8, 40), Band(4, 60), Band(2, 20))
    numbers, scale = packed_numbers(values, bands)
    store = replace(plain, rows=numbers, scale=scale, bands=bands)
    assert not store.numbers([9]).any() and not store.unit_rows([9]).any()
    assert [group.tolist() for group in near_duplicates(store, 0.98)] == [[7, 200, 201, 202]]
    (rows, cosines), (_, exact) = (nearest(each, np.array([7, 50]), 3) for each in (store, plain))
    assert set(rows[0]) == {200, 201, 202}
    np.testing.assert_allclose(cosines, exact, atol=0.02)
    np.testing.assert_allclose(store.unit_components(), plain.unit_rows(), atol=0.1)
    mu = rng.normal(size=(300, 2))
    shared = grouped(store, np.arange(300), mu) == grouped(plain, np.arange(300), mu)
    assert shared.mean() > 0.8
