"""When refreshes and curvature updates happen where the user gives no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ine_callback.curvature.intervals import curvature_interval, refresh_interval


@pytest.mark.parametrize(("interval", "smallest", "divisor"), [(refresh_interval, 20, 8), (curvature_interval, 4, 64)])
def test_intervals_grow_in_proportion_to_the_steps(
    interval: Callable[[int, int | None], int], smallest: int, divisor: int
) -> None:
    assert [interval(steps, None) for steps in (0, 159, 16_000)] == [smallest, smallest, 16_000 // divisor]


@pytest.mark.parametrize("interval", [refresh_interval, curvature_interval])
def test_a_number_given_by_the_user_is_the_interval(interval: Callable[[int, int | None], int]) -> None:
    assert interval(16_000, 7) == 7
