"""How many bits each number of a row has: reverse water-filling over components.

A query's score is a sum over components j. Its error has the variance ``Σ w_j D_j``, with w_j the mean square of
queries' numbers and D_j that of a rounding error, which for b bits is a share ``ERRORS[b]`` of the component's variance
over rows. Whichever counts of numbers with 8, 4 and 2 bits make that sum least are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.bands import WIDTHS, Band, long, packed, short, slices, turned
from ine_callback.scores import Floats

STEP_BYTES = 2  # of each row and band
# Uniform steps of least squared error for normal numbers, in standard deviations, and that error in variances (Max
# 1960); 8 bits are made for the largest number instead, at about four standard deviations.
STEPS = {4: 0.3352, 2: 0.9957}
ERRORS = {8: 4**2 / (3 * 256**2), 4: 0.01154, 2: 0.1188}


def allocate(worth: Floats, size: int) -> tuple[Band, ...]:
    """Bands for components of which each adds so much to the variance of scores, the leading ones first.

    Args:
        worth: Products ``w_j var_j`` [K]; what comes later counts as no more than what comes before.
        size: Bytes of a row, with its steps.

    Example:
        >>> allocate(np.arange(1, 400.0) ** -1.5, 128)
        (Band(width=8, count=13), Band(width=4, count=78), Band(width=2, count=280))
    """
    worth = np.maximum(np.maximum.accumulate(np.asarray(worth)[::-1])[::-1], np.finfo(np.float32).tiny)
    sums, best, counts = np.append(0.0, np.cumsum(worth)), np.inf, (0, 0, 0)
    for eight in range(min(len(worth), size - STEP_BYTES) + 1):
        room = size - eight - STEP_BYTES * (eight > 0)
        four = np.arange(0, min(len(worth) - eight, 2 * room) + 1, 2)
        left = room - four // 2 - STEP_BYTES * (four > 0)
        two = np.clip(4 * (left - STEP_BYTES), 0, (len(worth) - eight - four) // 4 * 4)
        upper, lower = sums[eight + four], sums[eight + four + two]
        lost = ERRORS[8] * sums[eight] + ERRORS[4] * (upper - sums[eight]) + ERRORS[2] * (lower - upper) - lower
        lost[left < 0] = np.inf
        if lost.min() < best:
            least = int(lost.argmin())
            best, counts = float(lost[least]), (eight, int(four[least]), int(two[least]))
    return tuple(Band(width, count) for width, count in zip(WIDTHS, counts, strict=True) if count)


def packed_numbers(values: NDArray[np.float32], bands: Sequence[Band]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Bytes [n, bytes] and steps [n, bands] of rows' numbers [n, k], of which the bands' are taken."""
    numbers = turned(values[:, : sum(band.count for band in bands)], bands)
    codes = np.empty(numbers.shape, np.int8)
    steps = np.empty((len(values), len(bands)), np.float32)
    for k, (band, (which, _)) in enumerate(zip(bands, slices(bands), strict=True)):
        part, half = numbers[:, which], 2 ** (band.width - 1)
        if band.width in STEPS:
            step = STEPS[band.width] * np.sqrt(np.square(part).mean(1))
        else:
            step = np.abs(part).max(1) / half
        steps[:, k] = long(short(step))
        whole = np.floor(part / np.where(steps[:, k] > 0, steps[:, k], 1)[:, None])
        codes[:, which] = np.clip(whole, -half, half - 1)
    return packed(codes, bands), steps
