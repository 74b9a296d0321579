"""Distance covariance of numbers and groups, weighted, with a permutation test.

    dCov² = Σᵢⱼ wᵢ wⱼ Aᵢⱼ Bᵢⱼ,   A = ‖fᵢ − fⱼ‖ centred by weighted row, column and grand means,   B = 1[zᵢ ≠ zⱼ]

(Székely, Rizzo and Bakirov 2007, Annals of Statistics 35; the V-statistic.) It is 0 in the population if and only if f
is independent of z. A is centred, so its sum over pairs of equal groups is all that is left of B.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distance_covariance(f: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """dCov² of the rows f and their groups; differentiable in f and the weights.

    Args:
        f: Numbers of each row [n, C].
        groups: One-hot groups [n, G].
        weights: Of the rows [n], with sum 1.

    Example:
        >>> f = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        >>> w = torch.full((4,), 0.25)
        >>> apart, mixed = torch.eye(2)[[0, 0, 1, 1]], torch.eye(2)[[0, 1, 0, 1]]
        >>> float(distance_covariance(f, apart, w)), abs(float(distance_covariance(f, mixed, w)))
        (0.25, 0.0)
    """
    each = groups * weights[:, None]
    return -(each * (_centred(f, weights) @ each)).sum()


def permutation_p(f: Tensor, groups: Tensor, permutations: int, seed: int) -> float:
    """p-value of independence: how often rows with permuted groups have at least this dCov².

    Args:
        f: Numbers of each row [n, C].
        groups: One-hot groups [n, G].
        permutations: Number of them; no p-value is below 1/(permutations + 1).
        seed: Of the permutations.

    Example:
        >>> f = torch.arange(20.0)[:, None]
        >>> permutation_p(f, torch.eye(2)[(torch.arange(20) > 9).long()], 99, 0)
        0.01
    """
    n, generator = len(f), torch.Generator().manual_seed(seed)
    centred = _centred(f, f.new_full((n,), 1 / n))
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(permutations))]
    found = torch.stack([-(groups[order] * (centred @ groups[order])).sum() for order in orders])
    tolerance = 1e-12 * found.abs().max()
    return float((found >= found[0] - tolerance).sum()) / (permutations + 1)


def _centred(f: Tensor, weights: Tensor) -> Tensor:
    squares = (f[:, None] - f[None]).square().sum(-1)
    apart = squares > 0  # the root has no derivative at 0
    distances = torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)
    means = distances @ weights
    return distances - means[:, None] - means[None] + means @ weights
