"""Sufficient dimension reduction: which directions of features tell about a target, weighted and differentiable.

In whitened coordinates x̃ = L⁻¹(x − μ), Σ = LLᵀ, with slices h of the target (its classes, or quantiles of a number),
their shares p_h, means m_h and covariances V_h, the directions are the leading eigenvectors of

    "sir"   M = Σ_h p_h m_h m_hᵀ                                       (Li 1991, JASA 86)
    "save"  M = Σ_h p_h (I − V_h)²                                     (Cook and Weisberg 1991, JASA 86)
    "dr"    M = 2 Σ_h p_h (V_h + m_h m_hᵀ)² + 2 A² + 2 tr(A) A − 2 I,   A that of "sir"
                                                                       (Li and Wang 2007, JASA 102)

SIR is blind to even functions, and has at most H − 1 directions. How many there are is tested one after the other: if d
suffice, the components outside of them are independent of the target and may be permuted (Cook and Yin 2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ine_callback.utilities.tracking import Track, untracked

Reduction = Literal["sir", "save", "dr"]
LEVEL = 0.05  # of the test of a further direction
TIE = 1e-9  # eigenvalues nearer than this have no eigenspaces of their own


def quantile_slices(values: Tensor, slices: int) -> Tensor:
    """Number of the quantile slice of each value [n], from 0 without gaps.

    Example:
        >>> quantile_slices(torch.tensor([0.1, 5.0, 0.2, 9.0]), 2)
        tensor([0, 1, 0, 1])
    """
    inner = torch.quantile(values.double(), torch.linspace(0, 1, slices + 1, dtype=torch.float64)[1:-1])
    found: Tensor = torch.unique(torch.searchsorted(inner, values.double(), right=True), return_inverse=True)[1]
    return found


def whitening(x: Tensor, weights: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Mean [p] and the Cholesky factor L [p, p] of the covariance, shrunk to a multiple of the identity."""
    mean = weights @ x
    centred = x - mean
    covariance = (centred * weights[:, None]).T @ centred
    p = len(mean)
    target = covariance.trace() / p * torch.eye(p, dtype=x.dtype)
    return mean, torch.linalg.cholesky((1 - shrinkage) * covariance + shrinkage * target)


def ledoit_wolf(x: Tensor) -> float:
    """The shrinkage of Ledoit and Wolf (2004, J. Multivariate Analysis 88), between 0 and 1.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(20, 10, dtype=torch.float64, generator=g)
        >>> 0.5 < ledoit_wolf(x) <= 1, ledoit_wolf(x * torch.arange(10).exp()) < 0.5
        (True, True)
    """
    n, p = x.shape
    centred = x - x.mean(0)
    covariance = centred.T @ centred / n
    level = covariance.trace() / p
    apart = covariance.square().sum() - p * level**2
    noise = (centred.square().sum(1).square().sum() / n - covariance.square().sum()) / n
    return float((noise / apart).clamp(0, 1)) if apart > 0 else 1.0


def kernel(whitened: Tensor, slices: Tensor, weights: Tensor, how: Reduction) -> Tensor:
    """The matrix M [p, p] whose leading eigenvectors are the directions.

    Args:
        whitened: x̃ [n, p].
        slices: One-hot slices of the target [n, H].
        weights: Of the rows [n], with sum 1.
        how: ``"sir"``, ``"save"`` or ``"dr"``.
    """
    each = slices * weights[:, None]
    shares = each.sum(0)
    means = each.T @ whitened / shares[:, None]
    between = (means * shares[:, None]).T @ means
    if how == "sir":
        return between
    identity = torch.eye(whitened.shape[1], dtype=whitened.dtype)
    second = torch.stack([(whitened * column[:, None]).T @ whitened for column in each.T]) / shares[:, None, None]
    if how == "save":
        less = identity - (second - means[:, :, None] * means[:, None])
        return (shares[:, None, None] * less @ less).sum(0)
    squares = (shares[:, None, None] * second @ second).sum(0)
    return 2 * (squares + between @ between + between.trace() * between - identity)


def eigenspace(matrix: Tensor, chosen: slice | Sequence[int], vectors: Tensor | None = None) -> Tensor:
    """Orthonormal basis [p, d] of the space of some eigenvectors; differentiable as a space, also with ties within it.

    The basis itself turns freely within its space, so its derivative is taken where it does not turn: exact for all
    that depends on the space alone. Eigenvalues tied across the space's border have no derivative; it is taken as 0.

    Args:
        matrix: Symmetric [p, p].
        chosen: Which eigenvectors, in the order of rising eigenvalues.
        vectors: All eigenvectors, where they are known.

    Example:
        >>> m = torch.diag(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64))
        >>> basis = eigenspace(m, slice(1, None))
        >>> (basis @ basis.T).diagonal()
        tensor([0., 1., 1.], dtype=torch.float64)
    """
    fixed = matrix.detach()
    if vectors is None:
        vectors = torch.linalg.eigh(fixed)[1]
    values = ((fixed @ vectors) * vectors).sum(0)
    inside = torch.zeros(len(values), dtype=torch.bool)
    inside[chosen] = True
    ours, others = vectors[:, inside], vectors[:, ~inside]
    gaps = values[inside][None] - values[~inside][:, None]
    reach = torch.where(gaps.abs() > TIE, 1 / torch.where(gaps.abs() > TIE, gaps, 1.0), 0.0)
    return ours + others @ ((others.T @ (matrix - fixed) @ ours) * reach)


def rank(
    x: Tensor, slices: Tensor, how: Reduction, permutations: int, seed: int, track: Track = untracked
) -> tuple[int, list[float]]:
    """How many directions tell about the target, by permutation tests, and the tests' p-values.

    Args:
        x: Whitened features [n, p].
        slices: One-hot slices of the target [n, H].
        how: ``"sir"``, ``"save"`` or ``"dr"``.
        permutations: Of each test.
        seed: Of the permutations.
        track: Shows a bar.

    Returns:
        The number of directions before the first test with a p-value above .05, and the p-values, the last of which
        is that one (none where the greatest number is reached).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 4, generator=g, dtype=torch.float64)
        >>> rank(x, torch.eye(2, dtype=torch.float64)[(x[:, 0] > 0).long()], "sir", 39, 0)
        (1, [0.025])
    """
    n, p = x.shape
    most = min(p, slices.shape[1] - 1) if how == "sir" else p
    generator = torch.Generator().manual_seed(seed)
    weights = x.new_full((n,), 1 / n)
    vectors = torch.linalg.eigh(kernel(x, slices, weights, how))[1].flip(1)
    rotated = x @ vectors  # the directions first, so that the first d columns stay and the others are permuted
    found: list[float] = []
    for d in range(most):
        observed = _rest(rotated, slices, weights, how, d)
        count = 1
        for _ in track(range(permutations), f"test of {d + 1} directions"):
            order = torch.randperm(n, generator=generator)
            permuted = torch.cat([rotated[:, :d], rotated[order, d:]], 1)
            count += int(_rest(permuted, slices, weights, how, d) >= observed)
        found.append(count / (permutations + 1))
        if found[-1] > LEVEL:
            return d, found
    return most, found


def _rest(x: Tensor, slices: Tensor, weights: Tensor, how: Reduction, d: int) -> float:
    """Sum of the eigenvalues of M but the d largest."""
    if how == "sir":  # its eigenvalues are those of the small Gram matrix of the slices' means
        each = slices * weights[:, None]
        means = each.T @ x / each.sum(0).sqrt()[:, None]
        matrix = means @ means.T
    else:
        matrix = kernel(x, slices, weights, how)
    return float(torch.linalg.eigvalsh(matrix).flip(0)[d:].sum())
