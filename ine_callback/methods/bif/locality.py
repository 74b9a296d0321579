"""How far chains may go where the settings leave it open: no farther than the loss is one basin and the model knows.

The localization γ gives draws half the trained weights' norm, and less, by halving, where going twice as far does not
raise the loss about four times as much, or where draws lose a tenth of what the model has learned. That looks at losses
alone, never at scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ine_callback.methods.bif.quadratic import Quadratic

RADIUS = 0.5  # in norms of the trained weights
_HALVINGS = 6
_LEAST, _MOST = 2.5, 6.0  # rise of the loss over that of half the way: 4 in a basin
_FORGOTTEN = 0.1  # of what was learned: where more is lost covariances are mostly noise (docs/methods/bif.md)
_NOTHING = 0.01  # of the loss: a rise this small says nothing, and does no harm


def pull(
    fisher: Quadratic, weights: Tensor, n_beta: float | None, loss: Callable[[Tensor], Tensor], normal: Tensor
) -> float:
    """The localization γ.

    Args:
        fisher: Directions and curvature; its own settings are not used.
        weights: Trained weights [P].
        n_beta: As given; None: as strong as the pull where the Fisher is largest.
        loss: Mean loss [C] at deviations [C, P] from the trained weights.
        normal: Standard normal numbers [C, P] for the draws that are tried; C mirrored to 2 C.
    """
    radius = RADIUS * float(weights.norm())
    if radius == 0:
        return 1.0
    here, blank = (float(loss(-share * weights[None])) for share in (0.0, 1.0))
    for _ in range(_HALVINGS):
        localization = len(weights) / radius**2
        posterior = fisher.at(n_beta or localization / max(fisher.steepest, 1e-30), localization)
        draws = posterior.apply(normal, lambda a: a**-0.5)
        draws = torch.cat([draws, -draws])  # so that slopes cancel
        rise, half = (float(loss(share * draws).mean()) - here for share in (1.0, 0.5))
        basin = abs(rise) <= _NOTHING * abs(here) or _LEAST * half <= rise <= _MOST * half
        if basin and not forgotten(here + rise, here, blank) > _FORGOTTEN:
            break
        radius /= 2
    return localization


def forgotten(loss: float, trained: float, blank: float) -> float:
    """Share of what a model has learned that it has lost where its loss is so high; NaN where it has learned nothing.

    Args:
        loss: Mean loss of some rows.
        trained: Theirs at the trained weights.
        blank: Theirs where all weights are 0, and the model does not look at its input.

    Example:
        >>> forgotten(1.5, trained=0.5, blank=2.5)
        0.5
    """
    return (loss - trained) / (blank - trained) if blank > trained else math.nan
