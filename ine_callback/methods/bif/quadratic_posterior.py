"""A Gaussian posterior around the trained weights: functions of its precision A = γI + GᵀG, without a dense matrix.

A has an eigenvalue γ + λ on each direction that the m rows of G span and γ on all others, so every function of it costs
one product with those directions: f(A) x = f(γ) x + Σ_k (f(γ + λ_k) − f(γ)) ⟨e_k, x⟩ e_k. The eigenvectors come from
the m x m Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
_MIN_EIGENVALUE = 1e-7  # fraction of the largest, below which it is a rounding error of the Gram matrix


class QuadraticPosterior:
    """A = n_beta F + localization I with F = mean of g gᵀ, the empirical Fisher of some rows.

    Args:
        gradients: Gradient of each row's loss at the trained weights [m, P].
        n_beta: Weight of the mean loss in the posterior.
        localization: γ > 0, which holds draws near the trained weights.

    Attributes:
        directions: Orthonormal directions [k, P] in which the loss is curved.
        curvature: Curvature of the mean loss along each [k].
        values: Eigenvalues of A along them [k].

    Example:
        >>> import torch
        >>> a = QuadraticPosterior(torch.tensor([[2.0, 0.0, 0.0]]), n_beta=1.0, localization=0.5)
        >>> a.apply(torch.ones(3), lambda eigenvalue: 1 / eigenvalue)
        tensor([0.2222, 2.0000, 2.0000])
    """

    def __init__(self, gradients: Tensor, n_beta: float, localization: float) -> None:
        scaled = gradients / max(1, len(gradients)) ** 0.5
        values, vectors = torch.linalg.eigh((scaled @ scaled.T).double())
        nonzero = values > _MIN_EIGENVALUE * values[-1:].clamp_min(torch.finfo(torch.float64).tiny)
        values, vectors = values[nonzero], vectors[:, nonzero]
        directions = (vectors / values.sqrt()).T.to(gradients.dtype) @ scaled  # [k, P], orthonormal
        self._set(directions, values, n_beta, localization)

    def _set(self, directions: Tensor, curvature: Tensor, n_beta: float, localization: float) -> None:
        self.directions, self.curvature, self.n_beta = directions, curvature, n_beta
        self.localization = torch.tensor(localization, dtype=torch.float64, device=directions.device)
        self.values = n_beta * curvature + localization

    def at(self, n_beta: float, localization: float, curvature: Tensor | None = None) -> QuadraticPosterior:
        """The same directions under other settings, or with another curvature along each [k]."""
        found = QuadraticPosterior.__new__(QuadraticPosterior)
        found._set(self.directions, self.curvature if curvature is None else curvature, n_beta, localization)
        return found

    def measured(self, curvature: Callable[[Tensor], Tensor]) -> QuadraticPosterior:
        """The same directions with the curvature of the loss along each, in place of the Fisher's eigenvalues.

        The Fisher's directions are good, but its scale is right only for a likelihood that fits: for a squared error it
        is wrong by the factor of the residual variance.

        Args:
            curvature: Maps displacements d [k, P] to d · H d / ‖d‖² [k]; called with posterior standard deviations.
        """
        displacement = self.directions / self.values.sqrt().to(self.directions.dtype)[:, None]
        return self.at(self.n_beta, float(self.localization), curvature(displacement).double().clamp_min(0))

    @property
    def steepest(self) -> float:
        """The largest curvature of the mean loss; 0 where there is none."""
        return float(self.curvature.max()) if len(self.curvature) else 0.0

    @property
    def largest(self) -> float:
        """The largest eigenvalue of A."""
        return float(self.values.max()) if len(self.values) else float(self.localization)

    @property
    def spread(self) -> float:
        """Mean squared distance tr(A⁻¹) of the posterior's draws from its centre."""
        others = self.directions.shape[1] - len(self.values)
        return float((1 / self.values).sum() + others / self.localization)

    def apply(self, x: Tensor, function: Function) -> Tensor:
        """``function(A) x`` for vectors x [..., P]; the function works on eigenvalues, element by element."""
        base = function(self.localization)
        extra = (function(self.values) - base).to(x.dtype)
        out = x * base.to(x.dtype)
        return out + (x @ self.directions.T * extra) @ self.directions if bool((extra != 0).any()) else out
