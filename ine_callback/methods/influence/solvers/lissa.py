"""LiSSA, the truncated Neumann series: ``x <- x + a [v - (F~ + D) x]`` with F~ by a minibatch, from ``a v``.

Koh and Liang's form ``h <- v + (1 - d) h - F~ h / s`` is this one with ``a = 1 / s`` and ``D = d s``. Here a is the
inverse of the largest eigenvalue, the minibatch is drawn anew in each step by a sampler (:mod:`..samplers`), and the
result is the mean over the last half.
"""

from __future__ import annotations

from torch import Tensor

from ine_callback.methods.influence.solvers.base import Solution, System
from ine_callback.methods.influence.solvers.descent import descend


def lissa(system: System, v: Tensor, iterations: int, step: float | None, momentum: float, tol: float) -> Solution:
    """See the module; raises InfluenceError where it diverges."""
    return descend(system, v, 0 * v, lambda r: r, iterations, step, momentum, tol, "lissa")
