r"""Rows' vectors become few numbers on disk: the leading components in the metric of queries.

With C the queries' covariance (K-FAC's, which is diagonal in the store's entries) and V the leading eigenvectors of the
covariance of ``C^(1/2) z`` over the rows, a row is ``V^T C^(1/2) z`` and a query ``V^T C^(-1/2) v``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.report.stored_vectors import LEVELS

RIDGE = 0.3  # of the queries' mean variance
COVARIANCE_ROWS = 20_000  # rows that the leading components are taken from
CHUNK = 1 << 14  # rows that are reduced at once


def spread(vectors: Tensor, seen: Tensor, variances: Tensor) -> float:
    """What rows' vectors [n, W] spread a typical query by: ``sqrt(tr(Cov(z) C))``; NaN where nothing varies."""
    total, count = torch.zeros(2, variances.shape[0], dtype=torch.float64), 0
    for part, there in zip(vectors.split(CHUNK), seen.split(CHUNK), strict=True):
        known = part[there.to(part.device)].double().cpu()
        total += torch.stack([known.sum(0), known.square().sum(0)])
        count += len(known)
    if not count:
        return float("nan")
    mean, square = total / count
    found = float(((square - mean**2).clamp_min(0) * variances.double().cpu()).sum().sqrt())
    return found if found > 0 else float("nan")


def components(vectors: Tensor, variances: Tensor, dimensions: int) -> Tensor:
    """``C^(1/2) V`` [W, k]; the queries' factor is its inverse on these components, :func:`query_factor`."""
    roots = variances.sqrt()
    some = vectors
    if len(vectors) > COVARIANCE_ROWS:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:COVARIANCE_ROWS]
        some = vectors[chosen.to(vectors.device)]
    weighted = some.to(roots.device) * roots
    into: Tensor = roots[:, None] * _leading(weighted, dimensions)
    return into


def _leading(x: Tensor, count: int) -> Tensor:
    """Leading right singular vectors [W, k] of x [n, W], by the smaller one of its two Gram matrices; k <= n."""
    rows, width = x.shape
    gram = (x @ x.T if rows < width else x.T @ x).double()
    values, every = torch.linalg.eigh(gram / gram.diagonal().mean().clamp_min(1e-300))
    vectors: Tensor = every.flip(1)[:, :count].to(x)
    if rows >= width:
        return vectors
    kept = values.flip(0)[:count] > values[-1] * 1e-10  # what is left of the others is rounding
    return torch.nn.functional.normalize(x.T @ vectors[:, kept.to(vectors.device)], dim=0)


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
