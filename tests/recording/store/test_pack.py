"""How many bits numbers have, and what rounding to so few costs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ine_callback.recording.store.pack import ERRORS, STEP_BYTES, STEPS, allocate, packed_numbers
from ine_callback.report.bands import Band, long, short, turned, unpacked


def rounded(values: np.ndarray, bands: tuple[Band, ...]) -> np.ndarray:
    """Numbers [n, k], as rows have them."""
    return unpacked(*packed_numbers(values, bands), bands, np.zeros(values.shape))


@pytest.mark.parametrize("width", [4, 2])
def test_normal_numbers_lose_what_the_theory_says(width: int) -> None:
    rng, bands = np.random.default_rng(0), (Band(width, 400),)
    values = (rng.normal(size=(200, 400)) * 10 ** rng.uniform(-6, 6, (200, 1))).astype(np.float32)  # rows of any size
    found = rounded(values, bands)
    share = np.square(found - turned(values, bands)).sum(1) / np.square(values).sum(1)
    assert share.mean() == pytest.approx(ERRORS[width], rel=0.03)
    t, step = rng.normal(size=10**6), STEPS[width]  # the table's numbers themselves
    half = 2 ** (width - 1)
    each = [
        np.mean((np.clip(np.floor(t / s), -half, half - 1) * s + s / 2 - t) ** 2)
        for s in (step, 0.9 * step, 1.1 * step)
    ]
    assert each[0] == pytest.approx(ERRORS[width], rel=0.01) and each[0] < min(each[1:])


def test_turning_makes_one_large_number_no_worse_than_normal_ones() -> None:
    values, bands = np.zeros((1, 400), np.float32), (Band(4, 400),)
    values[0, 7] = 1  # one step for all would round the others to half of it
    found = rounded(values, bands)
    assert np.square(found - turned(values, bands)).sum() < 2 * ERRORS[4]


def test_eight_bits_are_within_half_a_step_of_the_largest_number() -> None:
    values, bands = np.random.default_rng(0).standard_cauchy(size=(50, 30)).astype(np.float32), (Band(8, 30),)
    _, steps = packed_numbers(values, bands)
    numbers = turned(values, bands)
    np.testing.assert_array_equal(steps[:, 0], long(short(np.abs(numbers).max(1) / 128)))
    assert (np.abs(rounded(values, bands) - numbers) <= steps * (0.5 + 1e-4)).all()


def test_rows_without_numbers_have_no_step() -> None:
    bands = Band(8, 3), Band(4, 4), Band(2, 4)
    _, steps = packed_numbers(np.zeros((2, 11), np.float32), bands)
    assert steps.shape == (2, 3) and not steps.any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(16, 200), st.floats(0, 3), st.integers(0, 99))
def test_bands_fit_into_the_bytes_and_use_them(count: int, size: int, decay: float, seed: int) -> None:
    worth = np.arange(1.0, count + 1) ** -decay * np.random.default_rng(seed).uniform(0.5, 2, count)
    bands = allocate(worth, size)
    used, numbers = sum(band.size + STEP_BYTES for band in bands), sum(band.count for band in bands)
    assert bands and used <= size and numbers <= count
    assert [band.width for band in bands] == sorted({band.width for band in bands}, reverse=True)
    if count + STEP_BYTES <= size:
        assert bands == (Band(8, count),)
    elif numbers < count - 3:
        assert used >= size - STEP_BYTES  # a band of its own may cost more than it brings


def error(worth: np.ndarray, counts: tuple[int, int, int]) -> float:
    """What so many leading components of 8, 4 and 2 bits lose."""
    shares = np.repeat([ERRORS[8], ERRORS[4], ERRORS[2]], counts)
    return float(worth[: len(shares)] @ shares + worth[len(shares) :].sum())


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("size", [24, 40])
def test_no_other_bands_lose_less(decay: float, size: int) -> None:
    worth = np.arange(1.0, 61) ** -decay
    bands = {band.width: band.count for band in allocate(worth, size)}
    found = error(worth, (bands.get(8, 0), bands.get(4, 0), bands.get(2, 0)))
    every = (
        counts
        for counts in product(range(size + 1), range(0, 2 * size, 2), range(0, 61, 4))
        if sum(counts) <= 60
        and counts[0] + counts[1] // 2 + counts[2] // 4 + STEP_BYTES * np.count_nonzero(counts) <= size
    )
    best = min(error(worth, counts) for counts in every)
    assert found == pytest.approx(best, rel=1e-9)
