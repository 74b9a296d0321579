"""The approximate inverses in closed form: K-FAC, EK-FAC, the Fisher's diagonal, and none (gradient dot products)."""

from __future__ import annotations

from torch import Tensor

from ine_callback.methods.influence.solvers.base import Solution, System


def approximate(system: System, v: Tensor) -> Solution:
    """``P v``, where P approximates ``(F + D)^-1``; the residual says how well."""
    x = system.precondition(v)
    return Solution(x, system.residual(x, v), exact=False)
