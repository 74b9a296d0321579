"""Chooses the localization γ: draws stay in one basin of the loss and lose little of what the model has learned.

γ starts where draws are half the norm of the trained weights away. The distance is halved until going twice as far
raises the loss about four times as much, and draws lose less than a tenth of what the model has learned. This uses
losses alone, never scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ine_callback.methods.bif.quadratic_posterior import QuadraticPosterior

START_DISTANCE = 0.5  # in norms of the trained weights
_MAX_HALVINGS = 6
_MIN_RISE, _MAX_RISE = 2.5, 6.0  # rise of the loss, divided by that at half the distance: 4 in a quadratic basin
_MAX_LEARNING_LOST = 0.1  # of what was learned: where more is lost covariances are mostly noise (docs/methods/bif.md)
_NEGLIGIBLE_RISE = 0.01  # of the loss


def choose_localization(
    fisher: QuadraticPosterior, weights: Tensor, n_beta: float | None, loss: Callable[[Tensor], Tensor], normal: Tensor
) -> float:
    """The localization γ.

    Args:
        fisher: Directions and curvature; its n_beta and localization are not used.
        weights: Trained weights [P].
        n_beta: As given; None: such that the data are as strong as the localization where the Fisher is largest.
        loss: Mean loss [C] at deviations [C, P] from the trained weights.
        normal: Standard normal numbers [C, P] for the trial draws; they are mirrored to 2 C.
    """
    distance = START_DISTANCE * float(weights.norm())
    if distance == 0:
        return 1.0
    here, blank = (float(loss(-fraction * weights[None])) for fraction in (0.0, 1.0))
    for _ in range(_MAX_HALVINGS):
        localization = len(weights) / distance**2
        posterior = fisher.at(n_beta or localization / max(fisher.steepest, 1e-30), localization)
        draws = posterior.apply(normal, lambda a: a**-0.5)
        draws = torch.cat([draws, -draws])  # a slope of the loss then cancels
        rise, half = (float(loss(fraction * draws).mean()) - here for fraction in (1.0, 0.5))
        basin = abs(rise) <= _NEGLIGIBLE_RISE * abs(here) or _MIN_RISE * half <= rise <= _MAX_RISE * half
        if basin and not learning_lost(here + rise, here, blank) > _MAX_LEARNING_LOST:
            break
        distance /= 2
    return localization


def learning_lost(loss: float, trained: float, blank: float) -> float:
    """Fraction of what a model has learned that is lost at a loss; NaN where it has learned nothing.

    Args:
        loss: Mean loss of some rows.
        trained: Their mean loss at the trained weights.
        blank: Their mean loss where all weights are 0, so that the model ignores its input.

    Example:
        >>> learning_lost(1.5, trained=0.5, blank=2.5)
        0.5
    """
    return (loss - trained) / (blank - trained) if blank > trained else math.nan
