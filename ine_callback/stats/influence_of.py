"""Influence values of any estimate that is a function of the rows' weights (infinitesimal jackknife).

    IFᵢ = ∂/∂ε T((1 − ε) w + ε δᵢ) = ∂T/∂wᵢ − Σⱼ wⱼ ∂T/∂wⱼ          SE = √(Σᵢ IFᵢ²) / n

(Hampel 1974; Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans). Leaving row i out of n moves T by
about −IFᵢ/(n − 1). T contains all steps that lead to the estimate, also those that one would not write down by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.utilities.tracking import Track, untracked

Estimate = Callable[[Tensor], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Influence:
    """Values of m estimates, with the rows' influence on them.

    Attributes:
        value: [m].
        rows: Influence values IF [n, m]; each column has mean 0.
    """

    value: Tensor
    rows: Tensor

    @property
    def standard_error(self) -> Tensor:
        """Of the estimates [m]."""
        return self.rows.square().sum(0).sqrt() / len(self.rows)

    @property
    def removal(self) -> Tensor:
        """What leaving each row out adds to the estimates, to first order [n, m]."""
        return -self.rows / (len(self.rows) - 1)


def influence_of(estimate: Estimate, weights: Tensor, track: Track = untracked) -> Influence:
    """Influence of each row on estimates, by differentiating them in the rows' weights.

    Args:
        estimate: T: weights [n] that sum to 1 to m estimates, a tensor or single numbers; differentiable. Of single
            numbers each costs only what it is made of.
        weights: Where it is differentiated, such as 1/n for each row.
        track: Shows a bar.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> found = influence_of(lambda w: torch.stack([w @ x, w @ x**2 - (w @ x) ** 2]), torch.full_like(x, 1 / 3))
        >>> found.value, found.rows[:, 0]
        (tensor([3.0000, 4.6667], dtype=torch.float64), tensor([-2., -1.,  3.], dtype=torch.float64))
    """
    with torch.enable_grad():
        leaf = weights.detach().clone().requires_grad_()
        values = list(estimate(leaf))
        rows = [
            torch.autograd.grad(value, leaf, retain_graph=True)[0] if value.requires_grad else torch.zeros_like(leaf)
            for value in track(values, "influence on the estimates")
        ]
    jacobian = torch.stack(rows)
    return Influence(torch.stack(values).detach(), (jacobian - (jacobian @ weights)[:, None]).T.detach())


def left_out(estimate: Estimate, rows: Sequence[int], count: int) -> Tensor:
    """The estimates without each of some rows of ``count`` equally weighted ones, by computing them anew [rows, m].

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> left_out(lambda w: (w @ x)[None], [2], 3)
        tensor([[1.5000]], dtype=torch.float64)
    """
    found = []
    for row in rows:
        weights = torch.full((count,), 1 / (count - 1), dtype=torch.float64)
        weights[row] = 0
        found.append(torch.stack(list(estimate(weights))).detach())
    return torch.stack(found)


def agreement(predicted: Tensor, measured: Tensor) -> tuple[float, float]:
    """Correlation of two series, and the slope of the second on the first through the origin.

    Example:
        >>> agreement(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 4.0, -2.0]))
        (1.0, 2.0)
    """
    correlation = torch.corrcoef(torch.stack([predicted, measured]))[0, 1]
    return round(float(correlation), 12), float(predicted @ measured / predicted.square().sum())
