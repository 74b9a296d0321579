"""The linear system of an influence function, and what a solver returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ine_callback.methods.influence.fisher import FisherRows
from ine_callback.methods.influence.samplers import Sampler, Uniform
from ine_callback.methods.influence.space import ParameterSpace

HELD = 512  # rows by which a residual is measured where not all are stored
POWER_ITERATIONS = 10


def _no_progress(steps: Iterable[Any], description: str) -> Iterable[Any]:
    return steps


@dataclass
class System:
    """``(F + D) x = v`` for Q queries at once: Fisher F [P, P], diagonal damping D > 0.

    Attributes:
        space: The parameters.
        fisher: The rows of F.
        damping: The diagonal of D [P].
        precondition: An approximation of ``(F + D)^-1``, applied to vectors [Q, P].
        batch_size: Rows of a minibatch.
        sampler: Draws them.
        seed: Of the draws.
        progress: Shows a bar.
        factor: Cholesky factor of F + D [P, P] in float64, once it was needed.
    """

    space: ParameterSpace
    fisher: FisherRows
    damping: Tensor
    precondition: Callable[[Tensor], Tensor]
    batch_size: int = 256
    sampler: Sampler = field(default_factory=Uniform)
    seed: int = 0
    progress: Callable[[Sequence[Any], str], Iterable[Any]] = _no_progress
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def product(self, x: Tensor, rows: Tensor | None = None, weights: Tensor | None = None, draw: int = 0) -> Tensor:
        """``(F + D) x`` [Q, P] by all rows, or by a minibatch of some."""
        total: Tensor = self.fisher.product(self.space, x, rows, weights, draw) + self.damping * x
        return total

    def minibatch(self) -> tuple[Tensor, Tensor]:
        """Rows drawn with replacement [m], and their weights in the Fisher [m]."""
        return self.sampler.draw(self.fisher.rows, self.batch_size, self.generator)

    def residual(self, x: Tensor, v: Tensor) -> Tensor:
        """``|(F + D) x - v| / |v|`` [Q]; by a fixed sample of rows where not all gradients are stored."""
        rows = None
        if not self.fisher.stored and self.fisher.rows > HELD:
            rows = torch.randperm(self.fisher.rows, generator=torch.Generator().manual_seed(self.seed + 1))[:HELD]
        return relative_error(self.product(x, rows), v)

    def largest_eigenvalue(self, precondition: Callable[[Tensor], Tensor]) -> float:
        """Of the preconditioned operator on minibatches, by a few power iterations: the inverse of a stable step."""
        x = torch.randn(1, self.space.size, generator=self.generator, dtype=torch.float64).to(self.damping)
        found = 0.0
        for draw in range(POWER_ITERATIONS):
            x = precondition(self.product(x / x.norm(), *self.minibatch(), draw=draw))
            found = max(found, float(x.norm()))
        return found


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """``|found - wanted| / |wanted|`` [Q]; 0 where both are 0."""
    error: Tensor = (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(torch.finfo(wanted.dtype).tiny)
    return error


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x: The solutions [Q, P].
        residual: ``|(F + D) x - v| / |v|`` [Q].
        iterations: Steps taken; 0 for a closed form.
        largest: Estimate of the largest eigenvalue of the (preconditioned) operator, where the solver needs one.
        exact: Whether a small residual is to be expected: an approximate inverse has none.
    """

    x: Tensor
    residual: Tensor
    iterations: int = 0
    largest: float | None = None
    exact: bool = True


def together(solutions: Sequence[Solution]) -> Solution:
    """The solutions of chunks of queries as one."""
    largest = [one.largest for one in solutions if one.largest is not None]
    return Solution(
        torch.cat([one.x for one in solutions]),
        torch.cat([one.residual for one in solutions]),
        max(one.iterations for one in solutions),
        max(largest) if largest else None,
        all(one.exact for one in solutions),
    )


class Solver(Protocol):
    """Solves for all queries at once."""

    def __call__(self, system: System, v: Tensor) -> Solution:
        """Solves ``(F + D) x = v`` for v [Q, P].

        Raises:
            CurvatureError: Where the solution diverges or the system is singular.
        """
