"""SGLD against closed forms: stationary laws at finite step size, the control-variate chain, the sampler's state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ine_callback.methods.bif.quadratic_posterior import QuadraticPosterior
from ine_callback.methods.bif.sgld import SGLD, Curved, Diagonal, Law

P, N_BETA, GAMMA = 6, 20.0, 3.0
GRADIENTS = torch.randn(4, P, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
FISHER = GRADIENTS.T @ GRADIENTS / 4
A = N_BETA * FISHER + GAMMA * torch.eye(P, dtype=torch.float64)


def quadratic() -> QuadraticPosterior:
    return QuadraticPosterior(GRADIENTS, N_BETA, GAMMA)


def sgld(power: float, step: float, averaged: bool = False, antithetic: bool = False) -> SGLD:
    generator = torch.Generator().manual_seed(1)
    return SGLD(Curved(quadratic(), power), step, N_BETA, GAMMA, generator, averaged, antithetic)


def of_matrix(matrix: Tensor, function: object) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(function(values)) @ vectors.T  # type: ignore[operator]


@pytest.mark.parametrize("function", [torch.sqrt, torch.reciprocal, lambda a: a - 0.01 * a**2, torch.ones_like])
def test_functions_of_a_are_those_of_the_dense_matrix(function: object) -> None:
    x = torch.randn(5, P, dtype=torch.float64)
    assert torch.allclose(quadratic().apply(x, function), x @ of_matrix(A, function), atol=1e-8)  # type: ignore[arg-type]


def test_without_gradients_a_is_gamma() -> None:
    empty = QuadraticPosterior(torch.zeros(3, P), N_BETA, GAMMA)
    assert empty.largest == GAMMA and torch.equal(empty.apply(torch.ones(P), torch.square), torch.full((P,), 9.0))


@pytest.mark.parametrize("averaged", [False, True])
def test_scalar_law_solves_its_own_recursion(averaged: bool) -> None:
    """Variance against the impulse response of the chain, summed numerically."""
    step, h = 0.3, torch.tensor(2.0, dtype=torch.float64)
    r, noise = 1 - step * 2.0 / 2, math.sqrt(step)
    response = torch.zeros(400, dtype=torch.float64)
    for k, kick in enumerate([0.5, 0.5] if averaged else [1.0]):
        response[k:] += noise * kick * r ** torch.arange(400 - k, dtype=torch.float64)
    assert float(Law(step, averaged).variance(h)) == pytest.approx(float(response @ response), rel=1e-9)


@pytest.mark.parametrize("power", [0.0, -0.5])
@pytest.mark.parametrize("averaged", [False, True])
def test_quadratic_posterior_at_finite_step_size(power: float, averaged: bool) -> None:
    """V = A⁻¹ (I − εA/4)⁻¹ for plain SGLD, A⁻¹ with averaged noise; from the first draw on, and after 25 steps."""
    step = (1.0 if power else 0.8) * (1 if power else 1 / quadratic().largest)
    sampler = sgld(power, step, averaged)
    chains = 60_000
    state = sampler.init(chains, torch.zeros(P, dtype=torch.float64))
    inflation = 1 if averaged else of_matrix(A, lambda a: 1 / (1 - step * a ** (1 + 2 * power) / 4))
    exact = torch.linalg.inv(A) @ inflation if not averaged else torch.linalg.inv(A)
    for steps in (0, 25):
        for _ in range(steps):
            state = sampler.step(state, lambda d: d @ FISHER)
        deviation = sampler.coordinates.deviation(state.z)
        error = (deviation.T @ deviation / chains - exact).abs().max() / exact.abs().max()
        assert error < 0.02  # Monte Carlo: sqrt(2 / 60,000) = .006 for one entry
        # on a quadratic posterior chain and control-variate chain are the same
        assert state.control_variate is not None and torch.allclose(state.control_variate, state.z, atol=1e-9)
    assert torch.allclose(
        sampler.coordinates.covariance(torch.eye(P, dtype=torch.float64), sampler.law),  # type: ignore[attr-defined]
        exact,
        atol=1e-9,
    )


def test_minibatch_noise_inflates_the_posterior_as_the_formula_says() -> None:
    """V = A⁻¹ (1 − εA/4)⁻¹ (1 + (ε/4) n_beta² σ²/m), here for one parameter."""
    n_beta, gamma, step, sd = 10.0, 5.0, 0.05, 0.7
    noise = torch.Generator().manual_seed(7)
    a = QuadraticPosterior(torch.ones(1, 1, dtype=torch.float64), n_beta, gamma)
    sampler = SGLD(Curved(a, 0.0), step, n_beta, gamma, torch.Generator().manual_seed(2))
    state = sampler.init(100_000, torch.zeros(1, dtype=torch.float64))
    for _ in range(30):
        state = sampler.step(state, lambda d: d + sd * torch.randn(d.shape, generator=noise, dtype=d.dtype))
    expected = 1 / (15 - step * 15**2 / 4) * (1 + step / 4 * n_beta**2 * sd**2)
    assert float(state.z.var()) == pytest.approx(expected, rel=0.02)


def test_chains_start_around_the_minimum_of_the_quadratic_posterior() -> None:
    gradient = torch.randn(P, dtype=torch.float64)
    for power in (0.0, -0.5):
        sampler = sgld(power, 0.5 / quadratic().largest if power == 0 else 0.5)
        state = sampler.init(2, gradient)
        assert state.control_variate is not None
        shift = sampler.coordinates.deviation(state.z - state.control_variate)
        assert torch.allclose(shift, -N_BETA * torch.linalg.solve(A, gradient).expand(2, -1), atol=1e-8)


def test_antithetic_chains_are_mirror_images_on_a_symmetric_posterior() -> None:
    sampler = sgld(-0.5, 1.0, averaged=True, antithetic=True)
    state = sampler.init(6, torch.zeros(P, dtype=torch.float64))
    for _ in range(5):
        state = sampler.step(state, lambda d: d @ FISHER)
    assert torch.allclose(state.z[:3], -state.z[3:], atol=1e-12) and state.z.abs().min() > 0


@pytest.mark.long
def test_rmsprop_coordinates_leave_the_posterior_as_it_is() -> None:
    """V = S (H − εH²/4)⁻¹ S with H = SAS: A⁻¹ for small steps, whatever the scale."""
    scale = torch.tensor([0.5, 1.0, 1.5, 0.7, 1.2, 0.9], dtype=torch.float64)
    a = 2.0 * FISHER + GAMMA * torch.eye(P, dtype=torch.float64)
    h = a * scale * scale[:, None]
    step = 0.4 / float(torch.linalg.eigvalsh(h).max())
    sampler = SGLD(Diagonal(scale), step, 2.0, GAMMA, torch.Generator().manual_seed(4))
    state = sampler.init(40_000, torch.zeros(P, dtype=torch.float64))
    assert state.control_variate is None and not state.z.any()
    for _ in range(600):
        state = sampler.step(state, lambda d: d @ FISHER)
    deviation = sampler.coordinates.deviation(state.z)
    exact = torch.linalg.inv(h - step * h @ h / 4) * scale * scale[:, None]
    assert (deviation.T @ deviation / len(deviation) - exact).abs().max() < 0.02 * exact.abs().max()
    assert (exact - torch.linalg.inv(a)).abs().max() < 0.1 * exact.abs().max()


def test_the_generator_is_all_there_is() -> None:
    before = torch.get_rng_state()
    one, two = (sgld(-0.5, 1.0, True, True) for _ in range(2))
    states = [s.init(4, torch.zeros(P, dtype=torch.float64)) for s in (one, two)]
    states = [s.step(x, lambda d: d @ FISHER) for s, x in zip((one, two), states, strict=True)]
    assert torch.equal(states[0].z, states[1].z) and torch.equal(before, torch.get_rng_state())
