"""MMD against the full kernel matrices: value, derivative, leave-outs, Fourier features, conformal p-values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ine_callback.stats import mmd as module
from ine_callback.stats.mmd import MMD, FourierKernel, GaussianKernel, conformal_p, median_distance
from ine_callback.stats.ranks import spearman

KERNEL = GaussianKernel(2.0)


def rows(n: int, seed: int = 0, shifted: int = 5) -> Tensor:
    """Five features; one in ``shifted`` rows is moved."""
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[: n // shifted] += 1.5
    return x


def clean(m: int = 80, seed: int = 1) -> Tensor:
    return torch.randn(m, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(x: Tensor, y: Tensor) -> Tensor:
    """The kernel matrix from the definition."""
    return torch.exp(-(x[:, None] - y[None]).square().sum(-1) / 8)


def explicit(x: Tensor, v: Tensor, unbiased: bool, constant: float = 0.0) -> Tensor:
    """MMD² from whole matrices; the reference's term is that of the V-statistic, a constant."""
    k, n = full(x, x) + constant, len(x)
    within = (k.sum() - k.trace()) / (n * (n - 1)) if unbiased else k.mean()
    return within - 2 * (full(x, v) + constant).mean() + (full(v, v) + constant).mean()


def of(x: Tensor, v: Tensor, unbiased: bool = False, constant: float = 0.0) -> MMD:
    sums = KERNEL.self_sums(x) + constant * len(x)
    cross = KERNEL.sums(x, v) / len(v) + constant
    within = float(KERNEL.self_sums(v).mean()) / len(v) + constant
    return MMD(sums, cross, torch.ones_like(sums) + constant, within, unbiased)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n", [2 + 1, 60])
def test_leaving_out_each_row_is_computing_it_anew(unbiased: bool, n: int) -> None:
    x, v = rows(n), clean()
    found = of(x, v, unbiased)
    anew = torch.stack([explicit(torch.cat([x[:i], x[i + 1 :]]), v, unbiased) for i in range(n)])
    assert float(found.value - explicit(x, v, unbiased)) == pytest.approx(0, abs=1e-14)
    assert (found.without_each() - anew).abs().max() < 1e-14


@pytest.mark.parametrize("unbiased", [False, True])
@given(group=st.sets(st.integers(0, 39), min_size=1, max_size=37))
@settings(max_examples=25, deadline=None)
def test_leaving_out_a_group_is_computing_it_anew(unbiased: bool, group: set[int]) -> None:
    x, v = rows(40), clean()
    at = torch.tensor(sorted(group))
    keep = torch.tensor(sorted(set(range(40)) - group))
    found = of(x, v, unbiased).without(at, KERNEL.self_sums(x[at]).sum())
    # 40 rows cancel to a few, so the sums' rounding counts for more than with groups of moderate size
    assert abs(float(found - explicit(x[keep], v, unbiased))) < (1e-15 if len(keep) >= 30 else 5e-14)


def test_the_derivative_is_a_finite_difference() -> None:
    x, v = rows(50), clean()
    k, b = full(x, x), full(x, v).mean(1)
    base = torch.full((50,), 1 / 50, dtype=torch.float64)
    eps, found = 1e-6, of(x, v).derivative()
    for i in range(50):
        one = torch.zeros_like(base)
        one[i] = 1
        up, down = ((1 - e) * base + e * one for e in (eps, -eps))
        value = ((up @ k @ up - 2 * up @ b) - (down @ k @ down - 2 * down @ b)) / (2 * eps)
        assert abs(float(value - found[i])) < 1e-9


def test_the_first_order_is_wrong_by_the_square_of_the_number_of_rows() -> None:
    rho = []
    for n in (50, 100, 200, 400):
        found = of(rows(n), clean())
        exact, first = found.without_each() - found.value, -found.derivative() / (n - 1)
        assert 0.5 < float((exact - first).abs().max()) * n**2 < 3
        rho.append(spearman(exact.numpy(), first.numpy()))
    assert rho[0] > 0.995 and rho[-1] > 0.9999


def test_the_exact_ranking_corrects_the_training_term_alone() -> None:
    n, found = 50, of(rows(50), clean())
    ranking = n / (n - 1) * found.sums / n - found.cross
    change = found.without_each() - found.value
    assert spearman(change.numpy(), -ranking.numpy()) == pytest.approx(1, abs=1e-15)
    wrong = found.sums / n - n / (n - 1) * found.cross  # as in the authors' code
    assert spearman(change.numpy(), -wrong.numpy()) < 1 - 1e-6


def test_a_constant_in_the_kernel_changes_nothing() -> None:
    x, v = rows(60), clean()
    plain, moved = of(x, v), of(x, v, constant=3.0)
    assert (plain.without_each() - plain.value - (moved.without_each() - moved.value)).abs().max() < 1e-13


def test_tiles_give_the_sums_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, v = rows(60), clean()
    monkeypatch.setattr(module, "TILE", 7)
    assert (KERNEL.self_sums(x) - full(x, x).sum(1)).abs().max() < 1e-12
    assert (KERNEL.sums(x, v) - full(x, v).sum(1)).abs().max() < 1e-12


def test_far_from_the_origin_rounding_stays_small() -> None:
    x = rows(30)
    exact = full(x, x)
    assert (KERNEL.gram(x + 1e3, x + 1e3) - exact).abs().max() < 1e-8
    assert (KERNEL.gram(x + 1e3, x + 1e3) <= 1).all()


@pytest.mark.parametrize(("count", "limit"), [(256, 0.0067), (1024, 0.0047), (4096, 0.0017)])
def test_random_features_come_near_the_kernel(count: int, limit: float) -> None:
    """Greatest error of aᵢ − bᵢ, on 1,000 rows of a normal law; half as much again for the luck of the draw."""
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, 10, generator=g, dtype=torch.float64) for n in (1000, 200))
    kernel, exact = FourierKernel(3.0, 10, count), GaussianKernel(3.0)
    one, other = (k.self_sums(x) / len(x) - k.sums(x, v) / len(v) for k in (kernel, exact))
    assert (one - other).abs().max() < 1.5 * limit
    assert (kernel.gram(x[:9], x[:9]).diagonal() - 1).abs().max() < 1e-12
    assert (kernel.self_sums(x[:50]) - kernel.gram(x[:50], x[:50]).sum(1)).abs().max() < 1e-10


def test_the_median_distance_is_that_of_all_pairs() -> None:
    x = rows(41)
    distances = torch.cdist(x, x)[torch.ones(41, 41).triu(1).bool()]
    assert median_distance(x) == pytest.approx(float(distances.quantile(0.5)), rel=1e-12)


def conformal(seed: int, n: int = 6, m: int = 39, **moved: Any) -> float:
    """The first row's p-value, all rows drawn like the reference or that row moved."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x[1:] += 2  # the other rows may be anything
    x[0] += moved.get("by", 0.0)
    v = torch.randn(2 * m, 2, generator=g, dtype=torch.float64)
    kernel = GaussianKernel(1.0)
    return float(conformal_p(kernel, x, kernel.self_sums(x), v[:m], v[m:])[0])


def test_conformal_p_values_are_uniform_for_a_row_like_the_reference() -> None:
    """Exactly uniform on {1, …, 40}/40, with five other rows that are all shifted."""
    found = torch.tensor([conformal(seed) for seed in range(2000)]) * 40
    counts = torch.bincount(found.round().long(), minlength=41)[1:]
    assert counts.sum() == 2000
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # a discrete law: within a step of the uniform one, and above it for p-values that are too small
    uniform = (found.numpy() - torch.rand(2000, generator=torch.Generator().manual_seed(0)).numpy()) / 40
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_a_row_among_others_that_the_reference_lacks_has_a_small_p_value() -> None:
    assert sum(conformal(seed, by=2.5) <= 0.1 for seed in range(100)) > 80


def test_conformal_p_is_its_definition() -> None:
    x, v = rows(20), clean(30)
    found = conformal_p(KERNEL, x, KERNEL.self_sums(x), v[:15], v[15:])
    for i in (0, 7, 19):
        others = torch.cat([x[:i], x[i + 1 :]])
        z = torch.cat([x[i : i + 1], v[15:]])
        c = full(z, others).mean(1) - full(z, v[:15]).mean(1)
        assert float(found[i]) == pytest.approx((1 + int((c[1:] >= c[0]).sum())) / 16, abs=1e-12)
