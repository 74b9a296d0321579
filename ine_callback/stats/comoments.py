"""Streaming covariances between the losses of R rows and Q queries over the draws of C chains; no draw is stored."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Join = Callable[[Sequence[Tensor]], Tensor]  # chains of several processes [C, …] as one tensor


class Comoments:
    """Means and sums of centred products per chain, merged block by block (Chan, Golub and LeVeque 1983).

    Attributes:
        count: Draws n seen so far.

    Example:
        >>> import torch
        >>> a, b = torch.randn(10, 2, 3), torch.randn(10, 2, 4)  # 10 draws, 2 chains, 3 rows, 4 queries
        >>> moments = Comoments()
        >>> for block in range(0, 10, 5):
        ...     moments.update(a[block : block + 5], b[block : block + 5])
        >>> direct = torch.einsum("tcr,tcq->crq", a - a.mean(0), b - b.mean(0)) / 9
        >>> bool(torch.allclose(moments.covariance(), direct, atol=1e-6))
        True
    """

    def __init__(self) -> None:
        self.count = 0
        self._a = self._b = self._products = torch.zeros(())

    def update(self, a: Tensor, b: Tensor) -> None:
        """Adds n draws of the rows [n, C, R] and of the queries [n, C, Q]."""
        block = Comoments()
        block.count = len(a)
        block._a, block._b = a.mean(0), b.mean(0)
        block._products = torch.einsum("tcr,tcq->crq", a - block._a, b - block._b)
        self.merge(block)

    def merge(self, other: Comoments) -> None:
        """Adds all draws of another object."""
        if not other.count:
            return
        if not self.count:
            self.count, self._a, self._b, self._products = other.count, other._a, other._b, other._products
            return
        total = self.count + other.count
        gap_a, gap_b = other._a - self._a, other._b - self._b
        weight = self.count * other.count / total
        self._products = self._products + other._products + weight * gap_a[..., :, None] * gap_b[..., None, :]
        self._a = self._a + gap_a * (other.count / total)
        self._b = self._b + gap_b * (other.count / total)
        self.count = total

    @classmethod
    def joined(cls, parts: Sequence[Comoments], join: Join) -> Comoments:
        """Joins objects of different chains, with equal numbers of draws."""
        found = cls()
        found.count = parts[0].count
        if found.count:
            found._a, found._b = join([p._a for p in parts]), join([p._b for p in parts])
            found._products = join([p._products for p in parts])
        return found

    def covariance(self) -> Tensor:
        """Sample covariance of each chain [C, R, Q], with divisor n − 1 (0 with a single draw)."""
        return self._products / max(1, self.count - 1)


class Traces:
    """Streaming mean, variance, lag-1 autocorrelation and trend of single series; each [C, K].

    Args:
        draws: Draws planned; only the origin of the draw index, which keeps the sums small.
    """

    def __init__(self, draws: int) -> None:
        self._origin = draws / 2
        self.count = 0
        self._offset = self._last = self._sum = self._square = self._lagged = self._trend = torch.zeros(())
        self._time = self._time_square = 0.0

    def update(self, values: Tensor) -> None:
        """Adds one draw [C, K]."""
        x = values.double()
        if not self.count:
            self._offset = x  # sums of deviations from the first draw do not cancel
        x = x - self._offset
        time = self.count - self._origin
        if self.count:
            self._lagged = self._lagged + x * self._last
        self._sum, self._square, self._trend = self._sum + x, self._square + x**2, self._trend + x * time
        self._time, self._time_square = self._time + time, self._time_square + time**2
        self._last, self.count = x, self.count + 1

    @classmethod
    def joined(cls, parts: Sequence[Traces], join: Join) -> Traces:
        """Joins objects of different chains, with equal numbers of draws."""
        found = copy.copy(parts[0])
        for name in ("_offset", "_last", "_sum", "_square", "_lagged", "_trend"):
            setattr(found, name, join([getattr(p, name) for p in parts]))
        return found

    def mean(self) -> Tensor:
        """Mean of each series."""
        return self._offset + self._sum / self.count

    def variance(self) -> Tensor:
        """Sample variance of each series, with divisor n − 1."""
        return ((self._square - self._sum**2 / self.count) / max(1, self.count - 1)).clamp_min(0)

    def autocorrelation(self) -> Tensor:
        """Correlation of neighbouring draws, 0 for a constant series."""
        mean = self._sum / self.count
        total = self._square - self.count * mean**2
        # the two ends appear once in the lagged products and twice in the mean's part of them
        lagged = self._lagged - mean * (2 * self._sum - self._last) + (self.count - 1) * mean**2
        return torch.where(total > 0, lagged / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)

    def trend(self) -> Tensor:
        """Covariance with the draw index divided by the index's standard deviation.

        Its square is the trend's part of the variance. The product of a row's and a query's trend is their covariance
        by drift alone.
        """
        n = max(1, self.count - 1)
        covariance: Tensor = (self._trend - self._sum * self._time / self.count) / n
        time_variance = (self._time_square - self._time**2 / self.count) / n
        return covariance / math.sqrt(max(time_variance, 1e-300))
