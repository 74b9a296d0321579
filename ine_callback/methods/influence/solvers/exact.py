"""The whole Fisher as one matrix, factorised: the reference for small models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.influence.solvers.base import Solution, System

MAX_PARAMETERS = 8192


def dense_fisher(system: System) -> Tensor:
    """``F + D`` as a matrix [P, P] in float64.

    Raises:
        InfluenceError: If there are too many parameters.
    """
    size = system.space.size
    if size > MAX_PARAMETERS:
        raise InfluenceError(
            f"IF: solver='exact' factorises a matrix of all {size:,} captured parameters, at most {MAX_PARAMETERS:,}; "
            "use solver='pcg', which reaches the same solution, or choose layers=."
        )
    matrix = torch.diag(system.damping.double())
    for _, gradients in system.fisher.batches(None, 0):
        formed = system.space.join({block: gradients.formed(block) for block in system.space.blocks}).double()
        matrix += formed.T @ formed / system.fisher.rows
    return matrix


def exact(system: System, v: Tensor) -> Solution:
    """Cholesky solve in float64.

    Raises:
        InfluenceError: If there are too many parameters, or the damped Fisher is singular.
    """
    x = inverse_of(system)(v)
    return Solution(x.to(v.dtype), system.residual(x.to(v.dtype), v))


def inverse_of(system: System) -> Callable[[Tensor], Tensor]:
    """``(F + D)^-1`` of vectors [n, P], in float64, factorised once for a system; see :func:`exact`."""
    if system.factor is None:
        system.factor, failed = torch.linalg.cholesky_ex(dense_fisher(system))
        if int(failed):
            raise InfluenceError(
                f"IF: solver='exact': the Fisher with damping {float(system.damping.min()):.3g} is singular; raise "
                "damping."
            )
    factor = system.factor
    return lambda x: torch.cholesky_solve(x.double().T, factor).T
