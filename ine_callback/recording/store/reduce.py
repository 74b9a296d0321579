r"""Rows' vectors become few numbers on disk: the leading components in the metric of queries.

With C the queries' covariance (K-FAC's, which is diagonal in the store's entries) and V the leading eigenvectors of the
covariance of ``C^(1/2) z`` over the rows, a row is ``V^T C^(1/2) z`` and a query ``V^T C^(-1/2) v``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.report.stored_vectors import LEVELS

RIDGE = 0.3  # of the queries' mean variance
COVARIANCE_ROWS = 20_000  # rows that the leading components are taken from
CHUNK = 1 << 14  # rows that are reduced at once


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


def components(covariance: Tensor, variances: Tensor, dimensions: int) -> Tensor:
    """``C^(1/2) V`` [W, k], by the covariance [W, W] of ``C^(1/2) z``."""
    found = torch.linalg.eigh(covariance / covariance.diagonal().mean().clamp_min(1e-300)).eigenvectors
    into: Tensor = variances.sqrt()[:, None] * found.flip(1)[:, :dimensions].to(variances)
    return into


def components_of_few(weighted: Tensor, variances: Tensor, dimensions: int) -> Tensor:
    """The same of fewer rows ``C^(1/2) z`` [n, W] than entries, by their Gram matrix [n, n]; k <= n."""
    gram = (weighted @ weighted.T).double()
    values, every = torch.linalg.eigh(gram / gram.diagonal().mean().clamp_min(1e-300))
    kept = values.flip(0)[:dimensions] > values[-1] * 1e-10  # what is left of the others is rounding
    vectors = every.flip(1)[:, :dimensions].to(weighted)[:, kept.to(weighted.device)]
    # of small eigenvalues the vectors are orthogonal up to rounding alone
    into: Tensor = variances.sqrt()[:, None] * torch.linalg.qr(weighted.T @ vectors).Q
    return into


def some_of(rows: int) -> Tensor:
    """The rows that the covariance is taken of: all, or a random sample."""
    if rows <= COVARIANCE_ROWS:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:COVARIANCE_ROWS].sort().values


class Combined:
    """Rows' vectors as weighted sums of the run's and the passes', made chunk by chunk: no copy of all.

    Args:
        parts: Vectors [n, W], and what each row's count [n].
        seen: Rows that were observed [n].

    Attributes:
        sizes: What each part is divided by.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], seen: Tensor) -> None:
        self._parts, self.seen, self.sizes = parts, seen, [1.0] * len(parts)

    def _of(self, which: Tensor | slice, only: int | None = None) -> Tensor:
        found = [
            vectors[which] * weight[which, None].to(vectors) / size
            for k, ((vectors, weight), size) in enumerate(zip(self._parts, self.sizes, strict=True))
            if only in (None, k)
        ]
        return sum(part.to(found[0].device) for part in found[1:]) + found[0]

    def chunks(self) -> Iterator[Tensor]:
        """All rows' vectors, some after the other; at least one chunk, maybe without rows."""
        for start in range(0, max(1, len(self.seen)), CHUNK):
            yield self._of(slice(start, start + CHUNK))

    def spread(self, part: int, device: torch.device) -> Spread:
        """Of one part, over the rows that were observed."""
        found = Spread(self._parts[part][0].shape[1], device)
        for rows in self.seen.nonzero()[:, 0].split(CHUNK):
            found.take(self._of(rows, part))
        return found

    def weighted(self, roots: Tensor) -> Iterator[Tensor]:
        """``C^(1/2) z`` of the observed rows that components are taken from, some after the other."""
        rows = self.seen.nonzero()[:, 0]
        return (self._of(some).to(roots.device) * roots for some in rows[some_of(len(rows))].split(CHUNK))

    def covariance(self, roots: Tensor) -> Tensor:
        """Of ``C^(1/2) z`` over observed rows [W, W], without its factor."""
        out = torch.zeros(len(roots), len(roots), dtype=torch.float64, device=roots.device)
        for weighted in self.weighted(roots):
            out += (weighted.T @ weighted).double()
        return out


def numbers_of(values: Tensor, dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Numbers [n, k] in the store's type, and what each row's are multiplied with [n].

    The leading components weigh alike in a query, so all of a row have one step: a scale for each component would lose
    more (Spearman with the run's scores on G1 .9485 instead of .9516, .9538 without rounding).
    """
    size = values.abs().amax(1) / (LEVELS if dtype == "int8" else 1)
    size = torch.where(size > 0, size, 1.0)
    whole = values / size[:, None]
    found = (whole.round() if dtype == "int8" else whole).cpu().numpy().astype(dtype)
    return found, size.cpu().numpy().astype(np.float32)
