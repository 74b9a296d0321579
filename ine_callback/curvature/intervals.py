"""How often the costly parts of a recording happen, where the user names no number.

What lies behind a look changes ever more slowly in a training: directions, and means over the whole run so far. So the
gap between two looks grows with the steps already taken, and a run of T steps pays for log T of them. Until step 160 (a
training as short as protocol G1) the gaps are the smallest ones.
"""

from __future__ import annotations

REFRESH, STALEST = 20, 8  # at first every 20 steps; later after an eighth of the steps so far
CURVATURE, RAREST = 4, 64


def refresh_interval(steps: int, every: int | None) -> int:
    """Steps from a refresh of the directions, made before step ``steps``, to the next.

    Example:
        >>> [refresh_gap(steps, None) for steps in (0, 160, 8000)], refresh_gap(8000, every=50)
        ([20, 20, 1000], 50)
    """
    return every or max(REFRESH, steps // STALEST)


def curvature_interval(steps: int, every: int | None) -> int:
    """Steps that one observation of the curvature, in step ``steps``, stands for.

    Example:
        >>> [curvature_gap(steps, None) for steps in (0, 160, 8000)], curvature_gap(8000, every=10)
        ([4, 4, 125], 10)
    """
    return every or max(CURVATURE, steps // RAREST)
