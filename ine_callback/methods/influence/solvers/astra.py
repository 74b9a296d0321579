"""ASTRA (arXiv 2507.14740): descent preconditioned by EK-FAC, from EK-FAC's own solution.

    x <- x - a P [(F~ + D) x - v],   x_0 = P v,   P = EK-FAC's (F + D)^-1

with F~ by a minibatch of rows. One step from 0 with a = 1 is EK-FAC. Here the step is the inverse of the largest
eigenvalue of P (F~ + D), and the result the mean over the last half.
"""

from __future__ import annotations

from torch import Tensor

from ine_callback.methods.influence.solvers.base import Solution, System
from ine_callback.methods.influence.solvers.descent import descend


def astra(system: System, v: Tensor, iterations: int, step: float | None, momentum: float, tol: float) -> Solution:
    """See the module; raises InfluenceError where it diverges."""
    start = system.precondition(v)
    return descend(system, v, start, system.precondition, iterations, step, momentum, tol, "astra")
