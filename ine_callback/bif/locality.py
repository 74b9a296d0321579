"""How far chains may go where the settings leave it open: no farther than the loss is one basin, and slopes tell.

The localization γ gives draws half the trained weights' norm, and less, by halving, where going twice as far does not
raise the loss about four times as much, or where rows differ mostly in how their losses bend: scores would then say
which rows narrow the posterior, not where rows pull the weights, and that share grows with the fourth power of the
distance. Both look at losses alone, never at scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ine_callback.bif.quadratic import Quadratic

RADIUS = 0.5  # in norms of the trained weights
_HALVINGS = 6
_LEAST, _MOST = 2.5, 6.0  # rise of the loss over that of half the way: 4 in a basin
_NOTHING = 0.01  # of the loss: a rise this small says nothing, and does no harm
_BATCHES = 4  # of draws that are tried at each distance
_SECOND_ORDER = 0.25  # half of what the screen of the chains allows


def pull(
    fisher: Quadratic,
    weights: Tensor,
    n_beta: float | None,
    losses: Callable[[Tensor], Tensor],
    normal: Callable[[], Tensor],
) -> float:
    """The localization γ.

    Args:
        fisher: Directions and curvature; its own settings are not used.
        weights: Trained weights [P].
        n_beta: As given; None: as strong as the pull where the Fisher is largest.
        losses: Losses of some rows [C, R] at deviations [C, P] from the trained weights.
        normal: Draws standard normal numbers [C, P], for draws that are tried together with their mirror images.
    """
    radius = RADIUS * float(weights.norm())
    if radius == 0:
        return 1.0
    here = float(losses(torch.zeros_like(weights)[None]).mean())
    for _ in range(_HALVINGS):
        localization = len(weights) / radius**2
        posterior = fisher.at(n_beta or localization / max(fisher.steepest, 1e-30), localization)
        draws = (posterior.apply(normal(), lambda a: a**-0.5) for _ in range(_BATCHES))
        tried = [[losses(share * part) for share in (1.0, -1.0, 0.5, -0.5)] for part in draws]
        ahead, behind, *halfway = (torch.cat(parts) for parts in zip(*tried, strict=True))
        rise = float((ahead + behind).mean()) / 2 - here  # slopes cancel
        half = float((halfway[0] + halfway[1]).mean()) / 2 - here
        basin = abs(rise) <= _NOTHING * abs(here) or _LEAST * half <= rise <= _MOST * half
        if basin and second_order_share(ahead, behind) <= _SECOND_ORDER:
            break
        radius /= 2
    return localization


def second_order_share(ahead: Tensor, behind: Tensor) -> float:
    """How much of what tells rows apart, in their covariances with each other, is even in the deviation.

    Args:
        ahead: Losses of R rows at n deviations [n, R].
        behind: Losses at their mirror images [n, R].

    Example:
        >>> slopes, z = torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.randn(4000, 1, generator=torch.manual_seed(0))
        >>> round(second_order_share(slopes * z, -slopes * z), 2)
        0.0
        >>> round(second_order_share(slopes * z**2, slopes * z**2), 2)
        1.0
    """
    odd, even = (_apart((ahead - behind) / 2), _apart((ahead + behind) / 2))
    return even / (odd + even) if odd + even > 0 else 0.0


def _apart(values: Tensor) -> float:
    """How rows differ in their covariances with the others: mean square, as far as two halves of the draws agree."""
    rows = values.shape[1]
    if rows < 3:
        return 0.0
    found = []
    for half in values.double().chunk(2):
        centred = half - half.mean(0)
        covariance = (centred.T @ centred / len(half)).fill_diagonal_(0)  # a row with itself is larger anyway
        found.append((covariance - covariance.sum(0) / (rows - 1)).fill_diagonal_(0))
    return max(0.0, float((found[0] * found[1]).mean()))
