"""How much of self-influence is noise of the sketches that estimate it (:mod:`ine_callback.curvature.sketch`).

Each signal comes with two differences between halves of its sketch, whose squares have the variance of the signal's
error as their mean. Summed over the row's visits as the signals are, they give the variance of its score's error. That
is compared with the variance of the scores over all rows: r is the fraction which is noise, and scores without it would
be ranked with a correlation of about ``sqrt(1 - r)``.
"""

from __future__ import annotations

import numpy as np

from ine_callback.scores import Floats

PRIOR = 20  # differences that the mean over all rows counts as, beside a row's own
TOLD = 0.1  # the fraction of noise from which on the report tells it: a correlation below .95 with the exact scores
REFUSED = 0.5  # from which on rows are not ranked


def error_variance(halves: Floats, visits: Floats) -> Floats:
    """The variance [N] of the sketches' error in each row's shift.

    Two differences alone say little, so each row's is shrunk to what its visits would have at the mean of all rows.

    Args:
        halves: Differences between halves, summed over the row's visits [N, 2].
        visits: Number of these visits [N].

    Example:
        >>> error_variance(np.array([[3.0, 0.0], [0.0, 0.0]]), np.array([2.0, 1.0])).round(2).tolist()
        [6.27, 2.73]
    """
    own, count = np.square(halves).sum(1), halves.shape[1]
    pooled = visits * own.sum() / max(1.0, visits.sum())
    found: Floats = (count * own + PRIOR * pooled) / (count + PRIOR)
    return found


def fraction(error: Floats, shift: Floats, scale: Floats) -> float:
    """The fraction of the variance of scores that is error; 0 where nothing is known.

    Args:
        error: Variance of each row's error, before it is scaled [N].
        shift: The scores before they are scaled [N].
        scale: What they are multiplied by [N].

    Example:
        >>> round(fraction(np.array([0.5, 0.5, 0.5]), np.array([-1.0, 0.0, 1.0]), np.ones(3)), 2)
        0.75
    """
    error, mu = error * scale**2, shift * scale
    known = np.isfinite(error) & np.isfinite(mu)
    spread = float(mu[known].var()) if known.any() else 0.0
    return min(1.0, float(error[known].mean()) / spread) if spread > 0 else 0.0


def notes(fractions: Floats) -> list[str]:
    """What the report says of each query's fraction of noise [Q]."""
    noise = float(fractions.max(initial=0.0))  # only self-influence is estimated by sketches
    if noise < TOLD:
        return []
    what = f"{noise:.0%} of what its scores differ by is noise of sketches (rank=None computes them exactly)"
    if noise >= REFUSED:
        return [f"self-influence is not ranked: {what}"]
    return [f"self-influence: {what}; their correlation with the exact scores is about {np.sqrt(1 - noise):.2f}"]
