"""How many bits each number of a row has: reverse water-filling over components.

A query's score is a sum over components j. Its error has the variance ``Σ w_j D_j``, with w_j the mean square of
queries' numbers and D_j that of a rounding error, which for b bits is a share ``ERRORS[b]`` of the component's variance
over rows. So the next bits go to where they take most off that sum.
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
ERRORS = {8: 4**2 / (3 * 256**2), 4: 0.01154, 2: 0.1188, 0: 1.0}


def allocate(worth: Floats, size: int) -> tuple[Band, ...]:
    """Bands for components of which each adds so much to the variance of scores, the leading ones first.

    Args:
        worth: Products ``w_j var_j`` [K]; what comes later counts as no more than what comes before.
        size: Bytes of a row, with its steps.

    Example:
        >>> allocate(np.arange(1, 400.0) ** -1.5, 128)
        (Band(width=8, count=12), Band(width=4, count=78), Band(width=2, count=280))
    """
    worth = np.maximum.accumulate(np.asarray(worth)[::-1])[::-1]
    for steps in range(1, len(WIDTHS) + 1):  # more bands have more steps, which leave less for numbers
        counts = _counts(worth, 8 * (size - STEP_BYTES * steps))
        bands = tuple(Band(width, count) for width, count in counts.items() if count)
        if len(bands) <= steps:
            break
    return bands


def _counts(worth: Floats, bits: int) -> dict[int, int]:
    """How many of the leading components, whose worth descends, have 8, 4 and 2 bits, in whole bytes."""
    widths = sorted(WIDTHS)
    lower = [0, *widths[:-1]]
    each = [(ERRORS[low] - ERRORS[width]) / (width - low) * worth for low, width in zip(lower, widths, strict=True)]
    # what one more bit takes off; descending in both directions, so that a component's bits come one after the other
    order = np.argsort(-np.concatenate(each), kind="stable")
    spent = np.cumsum(np.repeat(np.subtract(widths, lower), len(worth))[order])
    reached = np.bincount(order[spent <= bits] // max(1, len(worth)), minlength=len(widths))
    found = dict(zip(widths, (reached - np.append(reached[1:], 0)).tolist(), strict=True))
    if found[8] < len(worth):  # what does not fill a byte has fewer bits
        found[2] += found[4] % 2
        found[4] -= found[4] % 2
        found[2] -= found[2] % 4
    return {width: found[width] for width in WIDTHS}


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
