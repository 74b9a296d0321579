"""Distance covariance against its definition, and its permutation test."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ine_callback.stats.distance_covariance import distance_covariance, permutation_p

G = torch.Generator().manual_seed(0)
F = torch.randn(20, 3, generator=G, dtype=torch.float64)
F[3] = F[7]  # rows at distance 0 from one another
CODES = torch.randint(3, (20,), generator=G)
GROUPS = torch.eye(3, dtype=torch.float64)[CODES]
UNIFORM = torch.full((20,), 0.05, dtype=torch.float64)


def by_definition(f: Tensor, codes: Tensor) -> float:
    n = len(f)
    a = np.array([[float((f[i] - f[j]).norm()) for j in range(n)] for i in range(n)])
    b = np.array([[float(codes[i] != codes[j]) for j in range(n)] for i in range(n)])
    both = [m - m.mean(0) - m.mean(1)[:, None] + m.mean() for m in (a, b)]
    return float((both[0] * both[1]).mean())


def test_it_is_the_definition() -> None:
    assert abs(float(distance_covariance(F, GROUPS, UNIFORM)) - by_definition(F, CODES)) < 1e-14


def test_a_weight_is_so_many_copies() -> None:
    counts = torch.randint(0, 4, (20,), generator=G)
    copies = torch.repeat_interleave(torch.arange(20), counts)
    found = distance_covariance(F, GROUPS, counts / counts.sum().double())
    assert abs(float(found) - by_definition(F[copies], CODES[copies])) < 1e-14


def test_its_derivatives_are_right_also_where_rows_coincide() -> None:
    weights = UNIFORM.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: distance_covariance(F, GROUPS, w), (weights,))
    apart = F[8:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: distance_covariance(f, GROUPS[8:], UNIFORM[8:] / 0.6), (apart,))
    whole = F.clone().requires_grad_()
    (found,) = torch.autograd.grad(distance_covariance(whole, GROUPS, UNIFORM), whole)
    assert torch.isfinite(found).all()


def test_p_values_are_uniform_without_dependence_and_small_with_it() -> None:
    generator = torch.Generator().manual_seed(1)
    f = torch.randn(400, 40, 1, generator=generator, dtype=torch.float64)
    groups = torch.eye(2, dtype=torch.float64)[torch.arange(40) % 2]
    p = np.array([permutation_p(each, groups, 39, seed) for seed, each in enumerate(f)])
    for level in (0.05, 0.1, 0.5):  # 400 draws: three standard errors
        assert abs((p <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / 400)
    assert permutation_p(f[0] + 2 * groups[:, :1], groups, 39, 0) == 1 / 40
