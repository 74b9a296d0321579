"""Conjugate gradients over all rows, plain or preconditioned by EK-FAC."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ine_callback.methods.influence.solvers.base import Solution, System, relative_error


def conjugate_gradients(
    system: System, v: Tensor, iterations: int, tol: float, precondition: Callable[[Tensor], Tensor] | None = None
) -> Solution:
    """Solves for all queries side by side; a query that has converged stays as it is.

    Args:
        system: The system.
        v: Right-hand sides [Q, P].
        iterations: Most products with the Fisher of all rows.
        tol: Relative residual at which a query is done.
        precondition: Approximation of the inverse; None: plain.
    """
    improve = precondition or (lambda r: r)
    x, r = torch.zeros_like(v), v.clone()
    z = improve(r)
    p, rz = z.clone(), _dots(r, z)
    taken = 0
    for step in system.progress(range(iterations), "conjugate gradients"):
        going = (r.norm(dim=1) > tol * v.norm(dim=1))[:, None]
        if not bool(going.any()):
            break
        product = system.product(p)
        length = torch.where(going, rz / _dots(p, product).clamp_min(torch.finfo(v.dtype).tiny), 0.0)
        x, r = x + length * p, r - length * product
        z = improve(r)
        rz, before = _dots(r, z), rz
        p = z + rz / before.clamp_min(torch.finfo(v.dtype).tiny) * p
        taken = step + 1
    return Solution(x, relative_error(v - r, v), taken)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)
