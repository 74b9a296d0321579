"""Rows' numbers of few bits: bands of numbers of the same width, packed into bytes.

A code of b bits is an integer c from -2^(b-1) on and means ``(c + 1/2) step``, each row and band having a step of its
own. Numbers of a band stand in planes: of two-bit numbers the first quarter has the highest two bits of the band's
bytes. Unpacking is then shifts of whole slices, which NumPy's arrays and torch's tensors write alike.

The numbers of a band are turned: the discrete cosine transform of its components with random signs. So all have one
variance and are nearly normal, which is what one step serves, and a rounding error points nowhere in particular.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, idct

WIDTHS = (8, 4, 2)  # bits of a code
HALF = 0.5  # of a step: codes are symmetrical about 0, which none of them means

AnyArray = TypeVar("AnyArray")  # of NumPy or torch


@dataclass(frozen=True)
class Band:
    """Numbers of one width that stand together.

    Attributes:
        width: Bits of each number.
        count: How many numbers, a multiple of those in a byte.

    Raises:
        ValueError: If there is no such band.

    Example:
        >>> Band(2, 8).size
        2
    """

    width: int
    count: int

    def __post_init__(self) -> None:
        if self.width not in WIDTHS or self.count < 1 or self.count * self.width % 8:
            raise ValueError(f"no band has {self.count} numbers of {self.width} bits")

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return self.count * self.width // 8


def slices(bands: Sequence[Band]) -> Iterator[tuple[slice, slice]]:
    """Which numbers are in each band, and which bytes."""
    number = byte = 0
    for band in bands:
        yield slice(number, number + band.count), slice(byte, byte + band.size)
        number, byte = number + band.count, byte + band.size


def planes(rows: AnyArray, bands: Sequence[Band]) -> Iterator[tuple[slice, AnyArray]]:
    """Codes [n, m] of rows' bytes [n, bytes] (int8), and which numbers they are of, plane by plane.

    Example:
        >>> rows = np.array([[0b0111_1000, 0b0001_1111]]).astype(np.int8)
        >>> [(which.start, codes.tolist()) for which, codes in planes(rows, [Band(4, 4)])]
        [(0, [[7, 1]]), (2, [[-8, -1]])]
    """
    for band, (numbers, places) in zip(bands, slices(bands), strict=True):
        part = cast(Any, rows)[:, places]
        for at in range(8 // band.width):
            start = numbers.start + at * band.size
            yield slice(start, start + band.size), (part << at * band.width) >> (8 - band.width)


def unpacked(rows: AnyArray, steps: AnyArray, bands: Sequence[Band], out: AnyArray) -> AnyArray:
    """Numbers [n, k] of rows' bytes [n, bytes] and steps [n, bands], written into ``out``; of NumPy or torch."""
    numbers, each = cast(Any, out), cast(Any, steps)
    for which, codes in planes(rows, bands):
        numbers[:, which] = codes
    numbers += HALF
    for k, (which, _) in enumerate(slices(bands)):
        numbers[:, which] *= each[:, k, None]
    return out


def packed(codes: NDArray[np.int8], bands: Sequence[Band]) -> NDArray[np.int8]:
    """Bytes [n, bytes] of codes [n, k]: the inverse of :func:`planes`."""
    out = np.zeros((len(codes), sum(band.size for band in bands)), np.uint8)
    for band, (numbers, places) in zip(bands, slices(bands), strict=True):
        low = codes[:, numbers].view(np.uint8) & np.uint8(2**band.width - 1)
        for at, plane in enumerate(np.split(low, 8 // band.width, 1)):
            out[:, places] |= plane << np.uint8(8 - (at + 1) * band.width)
    return out.view(np.int8)


def turned(numbers: NDArray[Any], bands: Sequence[Band], back: bool = False) -> NDArray[Any]:
    """Numbers [..., k] of components as rows have them, or back: an orthogonal map, the same for rows and queries.

    Example:
        >>> bands = [Band(8, 3), Band(4, 2)]
        >>> there = turned(np.eye(5), bands)
        >>> np.allclose(there @ there.T, np.eye(5)), np.allclose(turned(there, bands, back=True), np.eye(5))
        (True, True)
    """
    if not bands:
        return numbers
    signs = np.random.RandomState(0).choice([-1, 1], numbers.shape[-1])  # a stream that NumPy keeps for ever
    signs = signs.astype(numbers.dtype)
    out = numbers.copy() if back else numbers * signs
    for which, _ in slices(bands):
        out[..., which] = (idct if back else dct)(out[..., which], norm="ortho")
    return out * signs if back else out


def short(steps: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Steps as they are on disk: the upper half of a float32 (bfloat16), rounded up."""
    return ((np.ascontiguousarray(steps, dtype=np.float32).view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def long(steps: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Steps in float32.

    Example:
        >>> long(short(np.array([1.0, 1.001], dtype=np.float32))).tolist()
        [1.0, 1.0078125]
    """
    return (steps.astype(np.uint32) << 16).view(np.float32)
