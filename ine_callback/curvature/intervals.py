"""How often directions are refreshed and the curvature is updated, where the user gives no number.

Directions, and the curvature's means over the run so far, change ever more slowly. So the intervals grow with the steps
already taken, and a run of T steps pays for log T updates. Until step 160 the intervals have their minimum (protocol G1
is as short as that).
"""

from __future__ import annotations

MIN_REFRESH, MIN_CURVATURE = 20, 4  # steps
REFRESH_DIVISOR, CURVATURE_DIVISOR = 8, 64  # later the interval is the number of steps so far divided by these


def refresh_interval(steps: int, every: int | None) -> int:
    """Steps from a refresh of the directions, before step ``steps``, to the next one.

    Example:
        >>> [refresh_interval(steps, None) for steps in (0, 160, 8000)], refresh_interval(8000, every=50)
        ([20, 20, 1000], 50)
    """
    return every or max(MIN_REFRESH, steps // REFRESH_DIVISOR)


def curvature_interval(steps: int, every: int | None) -> int:
    """Steps that one curvature update, in step ``steps``, stands for.

    Example:
        >>> [curvature_interval(steps, None) for steps in (0, 160, 8000)], curvature_interval(8000, every=10)
        ([4, 4, 125], 10)
    """
    return every or max(MIN_CURVATURE, steps // CURVATURE_DIVISOR)
