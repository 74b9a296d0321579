"""Directions of a target: definitions in loops, derivatives of eigenspaces, the rank test, recovery of known spaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ine_callback.stats.sufficient_dimension import (
    Reduction,
    eigenspace,
    kernel,
    ledoit_wolf,
    quantile_slices,
    rank,
    whitening,
)

FLOAT = torch.float64


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=FLOAT)


def normal(n: int, p: int, seed: int = 0) -> Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def one_hot(codes: Tensor) -> Tensor:
    return torch.eye(int(codes.max()) + 1, dtype=FLOAT)[codes]


@pytest.mark.parametrize("how", ["sir", "save", "dr"])
def test_the_kernel_is_its_definition(how: Reduction) -> None:
    x, codes = normal(50, 3), quantile_slices(normal(50, 1, 1)[:, 0], 4)
    mean, root = whitening(x, uniform(50), 0.0)
    white = torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T
    assert torch.allclose(white.T @ white / 50, torch.eye(3, dtype=FLOAT), atol=1e-12)
    parts = [(white[codes == h], float((codes == h).double().mean())) for h in range(4)]
    eye = torch.eye(3, dtype=FLOAT)
    between = sum((p * torch.outer(w.mean(0), w.mean(0)) for w, p in parts), torch.zeros(3, 3, dtype=FLOAT))
    if how == "sir":
        expected = between
    elif how == "save":
        less = [eye - torch.cov(w.T, correction=0) for w, _ in parts]
        expected = sum((p * v @ v for v, (_, p) in zip(less, parts, strict=True)), torch.zeros(3, 3, dtype=FLOAT))
    else:  # E[(2I − E[(x − x')(x − x')ᵀ | slices])²] over independent pairs (Li and Wang 2007)
        expected = torch.zeros(3, 3, dtype=FLOAT)
        for one, p in parts:
            for other, q in parts:
                apart = (one[:, None] - other[None]).flatten(0, 1)
                square = 2 * eye - apart.T @ apart / len(apart)
                expected = expected + p * q * square @ square
    assert torch.allclose(kernel(white, one_hot(codes), uniform(50), how), expected, atol=1e-12)


def test_even_functions_are_seen_by_save_and_dr_alone() -> None:
    x = normal(4000, 4)
    slices = one_hot(quantile_slices(x[:, 1].square(), 5))
    shares = {}
    for how in ("sir", "save", "dr"):
        values, vectors = torch.linalg.eigh(kernel(x, slices, uniform(4000), how))  # type: ignore[arg-type]
        shares[how] = float(values[-1]), abs(float(vectors[1, -1]))
    assert shares["sir"][0] < 0.02 and shares["save"][1] > 0.99 and shares["dr"][1] > 0.99


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_an_eigenspace_has_the_derivative_of_its_projection(seed: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=FLOAT))[0]
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=FLOAT)
    values[5 - size :] = 5.0  # ties within the space
    values[: 5 - size] = values[0]  # and within the rest
    matrix = basis @ torch.diag(values) @ basis.T
    step = torch.randn(5, 5, generator=g, dtype=FLOAT)
    step = 1e-5 * (step + step.T)

    def projection(m: Tensor) -> Tensor:
        found = eigenspace(m, slice(5 - size, None))
        return found @ found.T

    _, found = torch.func.jvp(projection, (matrix,), (step,))
    difference = (projection(matrix + step) - projection(matrix - step)) / 2
    assert (found - difference).abs().max() < 1e-12
    chosen = eigenspace(matrix, [4, *range(5 - size, 4)])
    assert (chosen @ chosen.T - projection(matrix)).abs().max() < 1e-12


def test_ledoit_wolf_is_scikit_learn_s() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    for n, p in ((30, 40), (200, 10)):
        x = normal(n, p) * torch.arange(1, p + 1)
        assert ledoit_wolf(x) == pytest.approx(covariance.ledoit_wolf(x.numpy())[1], abs=1e-12)


def test_the_rank_test_finds_no_direction_in_noise_and_every_one_there_is() -> None:
    g = torch.Generator().manual_seed(0)
    noise, two = [], []
    for seed in range(100):
        x = torch.randn(200, 5, generator=g, dtype=FLOAT)
        noise.append(rank(x, one_hot(torch.randint(3, (200,), generator=g)), "sir", 39, seed)[0])
        if seed < 40:
            codes = (x[:, 0] > 0).long() + 2 * (x[:, 1] + 0.3 * torch.randn(200, generator=g) > 0).long()
            two.append(rank(x, one_hot(codes), "sir", 39, seed)[0])
    assert noise.count(0) >= 89  # level .05 of 100: nine too many are three standard errors
    assert two.count(2) >= 35 and min(two) == 2


def gen(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x̃ with Y from directions 0 and 1, and four groups from 0 and 2."""
    u = rng.normal(size=(n, 10))
    y = u[:, 1] / (0.5 + (u[:, 0] + 1.5) ** 2) + 0.2 * rng.normal(size=n)
    z = (u[:, 0] + 0.3 * rng.normal(size=n) > 0.5) + 2 * (u[:, 2] + 0.3 * rng.normal(size=n) > 0)
    return u, y, z


def test_spaces_are_recovered_at_the_rate_of_the_root_of_n() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(10, 10))
    root = torch.tensor(mixing @ mixing.T / 10 + 0.5 * np.eye(10))
    truth = torch.eye(10, dtype=FLOAT)
    sizes, angles = (500, 2000, 8000), []
    for n in sizes:
        each = []
        for _ in range(8):
            u, y, z = gen(n, rng)
            x = torch.tensor(u) @ root
            mean, lower = whitening(x, uniform(n), 0.0)
            white = torch.linalg.solve_triangular(lower, (x - mean).T, upper=False).T
            both = []
            for codes in (quantile_slices(torch.tensor(y), 10), torch.tensor(z)):
                space = eigenspace(kernel(white, one_hot(codes), uniform(n), "sir"), slice(8, None))
                dual = torch.linalg.solve_triangular(lower.T, space, upper=True)
                both.append(torch.linalg.qr(root @ dual)[0])
            to_truth = [torch.linalg.svdvals(q.T @ truth[:, [0, k]]).min() for q, k in zip(both, (1, 2), strict=True)]
            ours, _, _ = torch.linalg.svd(both[0].T @ both[1])
            shared, own = both[0] @ ours[:, 0], both[0] @ ours[:, 1]
            to_truth += [abs(shared @ truth[0]), abs(own @ truth[1])]
            each.append(torch.rad2deg(torch.arccos(torch.stack(to_truth).clamp(max=1))))
        angles.append(torch.stack(each).mean(0))
    assert (angles[-1] < 3).all(), angles[-1]
    for k in range(4):
        slope = np.polyfit(np.log(sizes), np.log([float(each[k]) for each in angles]), 1)[0]
        assert -0.6 < slope < -0.4, (k, slope)
