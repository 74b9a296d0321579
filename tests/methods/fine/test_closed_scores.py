"""f-INE's mu, its unit and its errors, of what a closing pass found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ine_callback.methods.closing import OnePass, averaged
from ine_callback.methods.fine.closing import mu_of, unit_of


def test_the_unit_has_a_part_of_the_order_and_leans_on_other_queries() -> None:
    sd, order = np.array([3.0, 0.1, 5.0]), np.array([0, 0, 550.0])
    found = averaged([OnePass(np.eye(3)[:2], np.ones((2, 3, 1)), sd, order)], np.ones(3))
    variance = np.array([9.0, 0.01, 25 + 2 * 550 / 100])
    np.testing.assert_allclose(unit_of(found, 100), 0.46 * np.sqrt(variance + 0.09 * 9.0), rtol=1e-12)
    lost = replace(found, sd=np.array([3.0, np.nan, 5.0]))
    assert np.isnan(unit_of(lost, 100)).tolist() == [False, True, False]


def test_from_fixed_weights_the_pass_ranks_in_the_size_of_the_run() -> None:
    rows, noise = np.arange(10.0)[:, None], np.ones((10, 1))
    found = averaged([OnePass(-rows, np.ones((10, 1, 0)), np.zeros(1), np.zeros(1))], np.ones(1))
    mu, se, unit = mu_of(found, np.full(10, 3), 7 * rows, noise)
    np.testing.assert_allclose(mu, -7 * rows)
    assert np.isfinite(se).all() and np.isnan(unit).all()


def test_a_pass_without_some_rows_leaves_these_the_runs_score() -> None:
    rows = np.arange(10.0)
    run, se = (np.stack([x, -x], 1) for x in (rows, np.ones(10)))
    shifts = np.stack([2 * rows, -6 * rows], 1)[:8]
    found = averaged([OnePass(shifts, np.ones((8, 2, 4)), np.ones(2), np.zeros(2))], np.ones(2))
    mu, error, _ = mu_of(found, np.full(10, 3), run, np.abs(se))
    assert np.isfinite(mu).all() and (error > 0).all()
    assert mu[9] == pytest.approx(mu[3] * 3, rel=0.3)  # about as much as they would have got
    run[4] = np.nan  # a row that was never observed
    mu, error, _ = mu_of(found, np.full(10, 3), run, np.abs(se))
    assert np.isnan(mu[4]).all() and np.isfinite(np.delete(mu, 4, 0)).all()
