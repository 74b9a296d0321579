"""Stochastic gradient Langevin dynamics around trained weights: C chains at once, as one tensor program.

    posterior   p(w) ∝ exp(−n_beta L(w) − (γ/2) ‖w − w*‖²)
    chain       z ← z − (ε/2) Sᵀ ∇U(w* + S z) + √ε ξ,     ∇U = n_beta ∇L_B + γ (w − w*)
    control     z′ ← (I − (ε/2) H) z′ + √ε ξ,             H = Sᵀ A S, the same ξ

S is the choice of coordinates. ``power = 0`` is plain SGLD (Welling and Teh 2011). ``power = -1/2`` takes A^(-1/2), in
which every direction of the quadratic posterior relaxes at one rate. A :class:`Diagonal` S is RMSprop-SGLD (Li et al.,
arXiv 1512.07666) with its preconditioner frozen, which leaves the posterior as stated.

z′ is the control-variate chain: the chain of the quadratic posterior N(0, A⁻¹) with the same noise ξ. It starts from
its stationary law and stays there, so the covariance of any two linear functions of it is known exactly.

With ``averaged`` the noise of a step is (ξ_t + ξ_{t+1}) / 2 (Leimkuhler and Matthews 2013): on a quadratic posterior
the stationary law is then right at *every* stable step size, instead of A⁻¹ (I − (ε/4) A)⁻¹.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ine_callback.methods.bif.quadratic_posterior import QuadraticPosterior

Gradient = Callable[[Tensor], Tensor]


class Coordinates(ABC):
    """The linear map S from a chain's own coordinates z to deviations from the trained weights."""

    @abstractmethod
    def deviation(self, z: Tensor) -> Tensor:
        """S z [C, P]."""

    @abstractmethod
    def transpose(self, gradient: Tensor) -> Tensor:
        """Sᵀ gradient [C, P]."""


class Diagonal(Coordinates):
    """S = diag(scale): RMSprop's coordinates.

    Args:
        scale: Square root of the preconditioner [P].
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def deviation(self, z: Tensor) -> Tensor:
        return z * self.scale

    def transpose(self, gradient: Tensor) -> Tensor:
        return gradient * self.scale


class Curved(Coordinates):
    """S = A^power, coordinates in which the law of the quadratic posterior's chain is known.

    Args:
        quadratic: The quadratic posterior's A.
        power: 0 for plain SGLD, -1/2 for one rate in all directions.
    """

    def __init__(self, quadratic: QuadraticPosterior, power: float) -> None:
        self.quadratic, self.power = quadratic, power

    def deviation(self, z: Tensor) -> Tensor:
        return z if self.power == 0 else self.quadratic.apply(z, lambda a: a**self.power)

    def transpose(self, gradient: Tensor) -> Tensor:
        return self.deviation(gradient)

    def curvature(self, a: Tensor) -> Tensor:
        """Eigenvalue of H = SᵀAS that belongs to the eigenvalue a of A."""
        return a ** (1 + 2 * self.power)

    def stationary(self, shape: torch.Size, law: Law, normal: Callable[[torch.Size], Tensor]) -> tuple[Tensor, Tensor]:
        """Start z′ [C, P] of control-variate chains and the noise ξ of their next step, from their joint law."""
        noise = normal(shape)
        if not law.averaged:
            return self.quadratic.apply(normal(shape), lambda a: law.variance(self.curvature(a)).sqrt()), noise
        # z′ already holds half of the noise that its next step will use
        rest = self.quadratic.apply(normal(shape), lambda a: (law.variance(self.curvature(a)) - law.step / 4).sqrt())
        return rest + 0.5 * math.sqrt(law.step) * noise, noise

    def covariance(self, vectors: Tensor, law: Law) -> Tensor:
        """V x for vectors x [Q, P]: u · V x is the covariance of u · δ′ and x · δ′, δ′ = S z′."""
        return self.quadratic.apply(vectors, lambda a: a ** (2 * self.power) * law.variance(self.curvature(a)))


@dataclass(frozen=True)
class Law:
    """The stationary law of the scalar chain z ← (1 − εh/2) z + √ε noise.

    Attributes:
        step: Step size ε < 4/h.
        averaged: Whether a step's noise is the mean of two neighbours'.

    Example:
        >>> h = torch.tensor(100.0)
        >>> Law(0.01, averaged=False).variance(h), Law(0.01, averaged=True).variance(h)
        (tensor(0.0133), tensor(0.0100))
    """

    step: float
    averaged: bool

    def variance(self, h: Tensor) -> Tensor:
        """1/h with averaged noise, else 1 / (h − ε h²/4)."""
        return 1 / h if self.averaged else 1 / (h - self.step * h**2 / 4)


class State(NamedTuple):
    """Chains z [C, P], their control-variate chains [C, P] or None, and the noise drawn for the next step [C, P]."""

    z: Tensor
    control_variate: Tensor | None
    noise: Tensor


@dataclass(frozen=True)
class SGLD:
    """The sampler: ``init`` once, then ``step``. A state is a value; only the generator changes.

    Attributes:
        coordinates: See :class:`Coordinates`.
        step_size: ε.
        n_beta: Weight of the mean loss.
        localization: γ.
        generator: Private source of all noise.
        averaged: Leimkuhler-Matthews noise, see the module.
        antithetic: The second half of the chains gets the negated noise of the first, so that products of odd and even
            parts of the losses cancel. Chains c and c + C/2 are not independent.

    Example:
        >>> a = QuadraticPosterior(torch.eye(1), n_beta=1.0, localization=1.0)  # A = 2
        >>> sgld = SGLD(Curved(a, -0.5), 1.0, 1.0, 1.0, torch.Generator().manual_seed(0), averaged=True)
        >>> state = sgld.init(4000, torch.zeros(1))
        >>> for _ in range(10):
        ...     state = sgld.step(state, lambda deviation: deviation)  # L = w²/2
        >>> round(float(sgld.coordinates.deviation(state.z).var()), 1)
        0.5
    """

    coordinates: Coordinates
    step_size: float
    n_beta: float
    localization: float
    generator: torch.Generator
    averaged: bool = False
    antithetic: bool = False

    @property
    def law(self) -> Law:
        """Stationary law of a control-variate chain in one direction."""
        return Law(self.step_size, self.averaged)

    def init(self, chains: int, gradient: Tensor) -> State:
        """Starts C chains.

        Args:
            chains: C.
            gradient: Mean gradient of the loss at the trained weights [P]. Where the coordinates know the quadratic
                posterior, chains start from its law around −A⁻¹ n_beta ∇L, else at the trained weights.
        """
        shape = torch.Size((chains, *gradient.shape))

        def normal(size: torch.Size) -> Tensor:
            return self._normal(size, gradient)

        if not isinstance(self.coordinates, Curved):
            return State(torch.zeros(shape, dtype=gradient.dtype, device=gradient.device), None, normal(shape))
        control_variate, noise = self.coordinates.stationary(shape, self.law, normal)
        power = self.coordinates.power
        centre = self.coordinates.quadratic.apply(gradient, lambda a: -self.n_beta * a ** (-1 - power))
        return State(control_variate + centre, control_variate, noise)

    def step(self, state: State, gradient: Gradient) -> State:
        """One step of all chains.

        Args:
            state: The chains.
            gradient: Mean gradient of the loss over a minibatch, [C, P] for deviations [C, P].
        """
        deviation = self.coordinates.deviation(state.z)
        drift = self.n_beta * gradient(deviation) + self.localization * deviation
        following = self._normal(state.z.shape, state.z)
        noise = math.sqrt(self.step_size) * ((state.noise + following) / 2 if self.averaged else following)
        z = state.z - self.step_size / 2 * self.coordinates.transpose(drift) + noise
        control_variate = state.control_variate
        if control_variate is not None:
            control_variate = self._control_step(control_variate, noise)
        return State(z, control_variate, following)

    def _control_step(self, z: Tensor, noise: Tensor) -> Tensor:
        assert isinstance(self.coordinates, Curved)
        curvature = self.coordinates.curvature
        return self.coordinates.quadratic.apply(z, lambda a: 1 - self.step_size / 2 * curvature(a)) + noise

    def _normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        size = (shape[0] // 2, *shape[1:]) if self.antithetic else shape
        noise = torch.randn(size, generator=self.generator, dtype=like.dtype, device=like.device)
        return torch.cat([noise, -noise]) if self.antithetic else noise
