"""What each row adds to an estimate: one-step estimators, term by term.

An estimate is the mean of its terms, and its influence function φᵢ = termᵢ − mean: the derivative of the estimate in
the weight of row i. μ, π, g and ratios of densities are nuisances, all at the row's values.

    mean of Y(a)     1{A=a} / π_a(Z) · (Y − μ_a(Z)) + μ_a(Z)                                   (Robins et al. 1994)
    WCDE's arm       w (Y − μ_a(Z₁, Z₂)) + h₁(Z₁) + h₂(Z₂) − mean h,     w = 1{A=a} p(Z₁) p(Z₂) / p(Z₁, Z₂, A=a)
                     h₁(z) = E μ_a(z, Z₂),   h₂(z) = E μ_a(Z₁, z):  independent draws of Z₁ and Z₂
    Y(a', M(a''))    v (Y − μ_a'(M, C)) + 1{A=a''} / π_a''(C) · (μ_a'(M, C) − g(C)) + g(C)     (Tchetgen 2012)
                     v = 1{A=a'} π_a''(M, C) / (π_a'(M, C) π_a''(C)),   g(C) = E[μ_a'(M, C) | A=a'', C]

The first is right in the limit if μ or π is, the second if μ or w is, the third if any two of μ, π and the density of M
are. The published form of the second, half of the mean of w (Y − μ) + h₁ + h₂, keeps half of the error of μ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def potential_mean(y: Floats, mu: Floats, weight: Floats) -> Floats:
    """Terms of E[Y(a)].

    Args:
        y: Outcomes [n].
        mu: E[Y | A=a, Z] [n].
        weight: 1{A=a} / P(A=a | Z) [n].
    """
    return weight * (y - mu) + mu


def weighted_controlled(y: Floats, mu: Floats, weight: Floats, h1: Floats, h2: Floats, plug_in: float) -> Floats:
    """Terms of an arm of the WCDE.

    Args:
        y: Outcomes [n].
        mu: E[Y | A=a, Z₁, Z₂] [n].
        weight: w [n].
        h1: Means of μ over Z₂ [n].
        h2: Means of μ over Z₁ [n].
        plug_in: Mean of either.
    """
    return weight * (y - mu) + h1 + h2 - plug_in


def cross_mean(y: Floats, mu: Floats, weight: Floats, g: Floats, mediator_weight: Floats) -> Floats:
    """Terms of E[Y(a', M(a''))].

    Args:
        y: Outcomes [n].
        mu: E[Y | A=a', M, C] [n].
        weight: v [n].
        g: E[μ | A=a'', C] [n].
        mediator_weight: 1{A=a''} / P(A=a'' | C) [n].
    """
    return weight * (y - mu) + mediator_weight * (mu - g) + g


def effective_size(weight: Floats) -> float:
    """(Σ w)² / Σ w²: as many equally weighted rows would be as good; 0 without weights.

    Example:
        >>> effective_size(np.array([1.0, 1.0, 0.0, 0.0]))
        2.0
    """
    total = float((weight**2).sum())
    return float(weight.sum()) ** 2 / total if total else 0.0
