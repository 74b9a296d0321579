r"""Rows' vectors become few numbers on disk: the leading components in the metric of queries.

With C the queries' covariance (K-FAC's, which is diagonal in the store's entries, and a ridge) and V the leading
eigenvectors of the covariance of ``C^(1/2) z`` over rows, a row is ``V^T C^(1/2) z`` and a query ``V^T C^(-1/2) v``.

A row's vectors of the run and of the closing pass stand side by side in z, ``V = (V_1, V_2)``. So a query's numbers are
those of both parts, each divided by its standard deviation over the rows, as mu has it: which of them says more of a
query differs from query to query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.recording.store.pack import packed_numbers
from ine_callback.report.bands import Band
from ine_callback.report.stored_vectors import LEVELS
from ine_callback.scores import Floats

RIDGE = 10.0  # of the queries' mean variance: later queries' variances are not those of the run
SAMPLE_ROWS, SAMPLE_BYTES = 20_000, 2**30  # rows that the leading components are taken from, at most
EXACT = 3072  # rows or entries: so many inner products are decomposed whole, in half a minute
SPARE, ITERATIONS = 64, 2  # beyond EXACT: components of the random range beside those wanted, and its improvements
CHUNK = 1 << 12  # rows that are reduced at once


class Spread:
    """How much rows' vectors spread a typical query: by sums, which add up over processes.

    Args:
        size: Entries W of a vector.
        device: Where the sums live.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.sums = torch.zeros(2 * size + 1, dtype=torch.float64, device=device)

    def take(self, vectors: Tensor) -> None:
        """Takes some rows' vectors [n, W]."""
        known = vectors.double()
        each = known.sum(0), known.square().sum(0), known.new_full((1,), len(known))
        self.sums += torch.cat(each).to(self.sums.device)

    def of(self, variances: Tensor) -> float:
        """What the vectors spread a typical query by: ``sqrt(tr(Cov(z) C))``; 1 where nothing varies."""
        count = float(self.sums[-1])
        if not count:
            return 1.0
        mean, square = self.sums[:-1].view(2, -1) / count
        found = float(((square - mean**2).clamp_min(0) * variances.double()).sum().sqrt())
        return found if np.isfinite(found) and found > 0 else 1.0


def components(weighted: Tensor, variances: Tensor, dimensions: int) -> Tensor:
    """``C^(1/2) V`` [W, k] with the leading directions V of rows ``C^(1/2) z`` [n, W].

    By the rows' inner products [n, n] or the entries' [W, W], whichever are fewer; where both are more than ``EXACT``,
    by a randomized range (Halko et al. 2011, arXiv 0909.4061), unless that would be of more than half of them, which
    takes longer (104 CPU seconds for 4,080 components of 5,000 rows, whole 39).
    """
    few, many = sorted(weighted.shape)
    if few > max(EXACT, 2 * (dimensions + SPARE)):
        directions = _leading(weighted, min(dimensions, few))
    elif 0 < few == len(weighted) < many:
        directions = _of_few_rows(weighted, dimensions)
    else:
        covariance = weighted.new_zeros(weighted.shape[1], weighted.shape[1], dtype=torch.float64)
        for part in weighted.split(CHUNK):
            covariance += (part.T @ part).double()
        directions = _decomposed(covariance)[1].flip(1)[:, :dimensions].to(weighted)
    into: Tensor = variances.sqrt()[:, None] * directions
    return into


def _leading(weighted: Tensor, dimensions: int) -> Tensor:
    devices = [weighted.device] if weighted.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        found: Tensor = torch.svd_lowrank(weighted, min(dimensions + SPARE, *weighted.shape), ITERATIONS)[2]
    return found[:, :dimensions]


def _of_few_rows(weighted: Tensor, dimensions: int) -> Tensor:
    """V [W, k] of fewer rows [n, W] than entries; k <= n."""
    gram = (weighted @ weighted.T).double()
    values, every = _decomposed(gram)
    kept = values.flip(0)[:dimensions] > values[-1] * 1e-10  # what is left of the others is rounding
    vectors = every.flip(1)[:, :dimensions].to(weighted)[:, kept.to(weighted.device)]
    # of small eigenvalues the vectors are orthogonal up to rounding alone
    directions: Tensor = torch.linalg.qr(weighted.T @ vectors).Q
    return directions


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, relative to their mean, and eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix / matrix.diagonal().mean().clamp_min(1e-300))
    return values, vectors


class Combined:
    """Rows' vectors of the run and of the passes side by side, made chunk by chunk: no copy of all.

    Args:
        parts: Vectors [n, W], and what each row's count [n].
        seen: Rows that were observed [n].

    Attributes:
        sizes: What each part is divided by.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], seen: Tensor) -> None:
        self._parts, self.seen, self.sizes = parts, seen, [1.0] * len(parts)

    def _of(self, which: Tensor | slice, device: torch.device, only: int | None = None) -> Tensor:
        found = [
            (vectors[which] * weight[which, None].to(vectors) / size).to(device)
            for k, ((vectors, weight), size) in enumerate(zip(self._parts, self.sizes, strict=True))
            if only in (None, k)
        ]
        return torch.cat(found, 1)

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """All rows' vectors [n, parts x W], some after the other; at least one chunk, maybe without rows."""
        for start in range(0, max(1, len(self.seen)), CHUNK):
            yield self._of(slice(start, start + CHUNK), device)

    def spread(self, part: int, device: torch.device) -> Spread:
        """Of one part, over the rows that were observed."""
        found = Spread(self._parts[part][0].shape[1], device)
        for rows in self.seen.nonzero()[:, 0].split(CHUNK):
            found.take(self._of(rows, device, part))
        return found

    def weighted(self, roots: Tensor, most: int) -> Tensor:
        """``C^(1/2) z`` [n, parts x W] of the rows that components are taken from: all that were observed, or some."""
        rows = self.seen.nonzero()[:, 0]
        if len(rows) > most:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most].sort().values]
        out = roots.new_empty(len(rows), len(roots))
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            out[start : start + len(part)] = self._of(part, roots.device) * roots
        return out


def mean_squares(rows: Tensor, directions: Tensor) -> Floats:
    """Mean squares [k] of what rows [n, W] have along directions [W, k]."""
    found = directions.new_zeros(directions.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        found += (part @ directions).double().square().sum(0)
    squares: Floats = (found / max(1, len(rows))).cpu().numpy()
    return squares


def worths(squares: Floats, into: NDArray[np.float32], variances: NDArray[np.float32]) -> Floats:
    """What each component adds to the variance of typical queries' scores over rows [k].

    Args:
        squares: Mean squares of the rows' numbers [k].
        into: Components ``C^(1/2) V`` [W, k].
        variances: C, with its ridge [W].
    """
    typical = np.maximum(variances - variances.mean() * RIDGE / (1 + RIDGE), 0)  # without the ridge
    found: Floats = squares * ((typical / variances**2) @ np.square(into)).astype(np.float64)
    return found


def numbers_of(values: Tensor, dtype: str, bands: Sequence[Band]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Numbers [n, k] in the store's type, and what each row's are multiplied with [n]; of mixed width see ``pack``.

    The leading components weigh alike in a query, so all of a row have one step: a scale for each component would lose
    more (Spearman with the run's scores on G1 .9485 instead of .9516, .9538 without rounding).
    """
    if dtype == "mixed":
        return packed_numbers(values.float().cpu().numpy(), bands)
    size = values.abs().amax(1) / (LEVELS if dtype == "int8" else 1)
    size = torch.where(size > 0, size, 1.0)
    whole = values / size[:, None]
    found = (whole.round() if dtype == "int8" else whole).cpu().numpy().astype(dtype)
    return found, size.cpu().numpy().astype(np.float32)
