"""How large the permutation null is, and what of it is reported."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.methods.base import host
from ine_callback.scores import Floats

MAX_NULL_DRAWS = 2**17  # per query, in the state


def null_size(rows: int, draws: int, stride: int) -> tuple[int, int]:
    """Returns the draws per row, and k where every k-th row has a null (a multiple of ``stride``).

    Their product ``rows / k x draws`` stays near ``MAX_NULL_DRAWS``.
    """
    draws = min(draws, max(2, MAX_NULL_DRAWS // max(rows, 1)))
    return draws, stride * max(1, -(-rows * draws // (MAX_NULL_DRAWS * stride)))


def add_permuted(null: Tensor, rows: Tensor, d: Tensor, stride: int, generator: torch.Generator) -> None:
    """Randomly permutes a batch's shifts among its rows, once per draw, and adds them to the null in place.

    Args:
        null: [N / stride + 1, draws, Q].
        rows: The batch's rows [b].
        d: Their shifts [b, Q].
        stride: Every how many rows there is a null; the last place collects the shifts of all others.
        generator: Draws the permutations.
    """
    size, draws = rows.shape[0], null.shape[1]
    keys = torch.rand(draws, size, generator=generator, device=d.device, dtype=torch.float32)
    permuted = d.index_select(0, keys.argsort(-1).T.reshape(-1)).view(size, draws, -1)
    place = torch.where(rows % stride == 0, rows // stride, null.shape[0] - 1)
    null.index_add_(0, place, permuted)


def enlarged(tensor: Tensor, rows: int) -> Tensor:
    """Returns the tensor with zeros for further rows."""
    larger = tensor.new_zeros(rows, *tensor.shape[1:])
    larger[: tensor.shape[0]] = tensor
    return larger


def standardised(
    null: Tensor, query: int, stride: int, seen: NDArray[np.bool_], variance: Floats
) -> tuple[Floats, Floats]:
    """Returns the standardised permuted shifts [M, R] of observed rows with a null, and the held-out draw [M]."""
    permuted = host(null[:-1, :, query])
    observed, v = seen[::stride], variance[::stride]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = permuted[observed] / np.where(v > 0, np.sqrt(v), np.nan)[observed, None]
    return z[:, 1:], z[:, 0]


def spread(size: int, limit: int) -> NDArray[np.int64]:
    """Returns at most ``limit`` evenly spaced indices below ``size``."""
    return np.linspace(0, size - 1, min(size, limit)).round().astype(np.int64)
