"""Influence of rows on an estimate: closed forms, leaving rows out, the bootstrap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ine_callback.stats.influence_of import agreement, influence_of, left_out

ROWS = 400
RNG = np.random.default_rng(0)
U = RNG.normal(size=(ROWS, 5))
X = torch.tensor(U @ RNG.normal(size=(5, 5)))
Z = torch.tensor((U[:, 0] + 0.5 * RNG.normal(size=ROWS) > 0).astype(float))
Y = torch.tensor(U @ np.array([0.8, 1, 0, 0, 0.5]) + RNG.normal(size=ROWS))
UNIFORM = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)


def beta(w: Tensor) -> Tensor:
    """The direction Σ⁻¹(m₁ − m₀) of a binary attribute."""
    w = w / w.sum()
    mean, share = w @ X, w @ Z
    covariance = ((X - mean) * w[:, None]).T @ (X - mean)
    return torch.linalg.solve(covariance, (w * Z) @ X / share - (w * (1 - Z)) @ X / (1 - share))


def whole(w: Tensor) -> Tensor:
    """The direction, and risk and slope of a regression without it."""
    w = w / w.sum()
    b, mean = beta(w), w @ X
    covariance = ((X - mean) * w[:, None]).T @ (X - mean)
    centred = X - mean
    out = centred @ b
    kept = centred - torch.outer(out, covariance @ b) / (b @ covariance @ b)
    y = Y - w @ Y
    gram = (kept * w[:, None]).T @ kept + 1e-3 * torch.eye(5, dtype=X.dtype)
    theta = torch.linalg.solve(gram, kept.T @ (w * y))
    f = kept @ theta
    return torch.cat([b, (w @ (y - f).square())[None], (w @ f.square())[None]])


def test_the_direction_s_influence_is_the_closed_form() -> None:
    found = influence_of(beta, UNIFORM)
    b, mean, share = beta(UNIFORM), X.mean(0), Z.mean()
    covariance = (X - mean).T @ (X - mean) / ROWS
    one, other = X[Z == 1].mean(0), X[Z == 0].mean(0)
    shifts = (Z / share)[:, None] * (X - one) - ((1 - Z) / (1 - share))[:, None] * (X - other)
    expected = torch.linalg.solve(covariance, (shifts - (X - mean) * ((X - mean) @ b)[:, None]).T).T + b
    assert (found.rows - expected).abs().max() < 1e-7
    projection = influence_of(lambda w: (torch.outer(beta(w), beta(w)) / beta(w).square().sum()).flatten(), UNIFORM)
    onto = torch.outer(b, b) / b.square().sum()
    half = torch.einsum("ij,nj,k->nik", torch.eye(5, dtype=X.dtype) - onto, expected, b) / b.square().sum()
    assert (projection.rows - (half + half.transpose(1, 2)).flatten(1)).abs().max() < 1e-7


def test_it_predicts_every_row_left_out() -> None:
    found = influence_of(whole, UNIFORM)
    assert (found.value - whole(UNIFORM)).abs().max() == 0
    assert found.rows.mean(0).abs().max() < 1e-12
    measured = left_out(whole, range(ROWS), ROWS) - found.value
    for k in range(len(found.value)):
        correlation, slope = agreement(found.removal[:, k], measured[:, k])
        assert correlation >= 0.999 and 0.98 <= slope <= 1.02


def test_its_standard_error_is_the_bootstrap_s() -> None:
    found = influence_of(whole, UNIFORM)
    rng = np.random.default_rng(1)
    drawn = [whole(torch.tensor(rng.multinomial(ROWS, UNIFORM.numpy()).astype(float))) for _ in range(1000)]
    ratio = found.standard_error / torch.stack(drawn).std(0)
    assert ((ratio > 0.9) & (ratio < 1.1)).all(), ratio


def test_weights_that_are_not_normalised_are_taken_as_shares() -> None:
    """A mean Σ wᵢ xᵢ has the influence xᵢ − mean."""
    found = influence_of(lambda w: w @ X, UNIFORM)
    assert (found.rows - (X - X.mean(0))).abs().max() < 1e-12


def test_single_numbers_give_what_a_tensor_gives() -> None:
    one, other = influence_of(whole, UNIFORM), influence_of(lambda w: [*beta(w), *whole(w)[5:]], UNIFORM)
    assert (one.rows - other.rows).abs().max() < 1e-12


def test_a_constant_has_no_influence() -> None:
    found = influence_of(lambda w: [w @ Y, w.new_tensor(float("nan"))], UNIFORM)
    assert torch.isnan(found.value[1]) and not found.rows[:, 1].any() and torch.isfinite(found.rows[:, 0]).all()
