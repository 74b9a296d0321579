"""Solvers of ``(F + D) x = v``: one file each, one protocol (:mod:`.base`)."""

from torch import Tensor

from ine_callback.methods.influence.settings import IFSettings
from ine_callback.methods.influence.solvers.astra import astra
from ine_callback.methods.influence.solvers.base import Solution, System
from ine_callback.methods.influence.solvers.cg import conjugate_gradients
from ine_callback.methods.influence.solvers.datainf import datainf
from ine_callback.methods.influence.solvers.exact import exact
from ine_callback.methods.influence.solvers.kronecker import approximate
from ine_callback.methods.influence.solvers.lissa import lissa


def solve(system: System, v: Tensor, settings: IFSettings) -> Solution:
    """Solves by the solver that the settings name, with what they say of it."""
    steps = (settings.iterations, settings.step, settings.momentum, settings.tol)
    match settings.solver:
        case "exact":
            return exact(system, v)
        case "cg":
            return conjugate_gradients(system, v, settings.iterations, settings.tol)
        case "pcg":
            return conjugate_gradients(system, v, settings.iterations, settings.tol, system.precondition)
        case "astra":
            return astra(system, v, *steps)
        case "lissa":
            return lissa(system, v, *steps)
        case "datainf":
            return datainf(system, v)
        case _:
            return approximate(system, v)
