"""f-INE's tests: p uniform and t calibrated in null runs, planted rows found; and the permuted draws behind p."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import Scores
from ine_callback.stats.hypothesis_tests import uniformity_p
from tests.helpers.null_runs import CPU, Step, infos, scores, steps


def test_permuted_shifts_have_the_exact_variance_and_sum_to_zero() -> None:
    fine = FINE(null_draws=2000)
    fine.start(4, infos(1), CPU)
    fine.update(torch.arange(4), torch.tensor([[1.0], [2.0], [4.0], [10.0]]), 0.5)
    state = fine.state_dict()
    permuted = state["null"][:4, :, 0]
    np.testing.assert_allclose(permuted.sum(0), 0, atol=1e-5)
    np.testing.assert_allclose(permuted.var(1, unbiased=False), state["variance"][:, 0], rtol=0.1)
    np.testing.assert_allclose(permuted.unique(), np.array([-1.625, -1.125, -0.125, 2.875]) * 4 / 3, rtol=1e-6)


@pytest.fixture(scope="module")
def null_runs() -> list[Scores]:
    return [scores(FINE(seed=s), steps(300, 20, 150, 1, s, heavy=True), 300, 1) for s in range(20)]


def test_p_is_uniform_in_null_runs_with_heavy_tails(null_runs: list[Scores]) -> None:
    failures = [s for s, found in enumerate(null_runs) if uniformity_p(found.p) <= 0.01]
    assert len(failures) <= 1, failures
    assert np.nanmin([np.nanmin(found.p) for found in null_runs]) >= 1 / (1 + 20 * 300)
    rate = np.nanmean([np.nanmean(found.p < 0.05) for found in null_runs])
    assert rate == pytest.approx(0.05, abs=0.01)  # 6,000 tests: standard error .003


def test_in_run_check_passes_in_null_runs(null_runs: list[Scores]) -> None:
    assert sum(found.null_ks_p[0] <= 0.01 for found in null_runs) <= 1


def test_in_run_check_fails_when_the_null_is_wrong() -> None:
    fine = FINE()
    fine.start(300, infos(1), CPU)
    for step in steps(300, 20, 150, 1):
        fine.update(*step)
    fine._state["null"][:, 0] *= 1.5
    assert fine.compute().null_ks_p[0] < 0.001


@pytest.mark.long
def test_p_t_is_calibrated_in_null_runs() -> None:
    # Gaussian signals whose scale grows 50-fold: exact up to the shared prior; 6,000 tests, standard error .003.
    runs = [scores(FINE(), steps(300, 20, 150, 1, s), 300, 1) for s in range(20)]
    assert sum(uniformity_p(found.p_t) <= 0.01 for found in runs) <= 1
    assert np.mean([np.nanmean(found.p_t < 0.05) for found in runs]) == pytest.approx(0.05, abs=0.012)


def test_p_t_bends_under_heavy_tails_within_its_stated_margin(null_runs: list[Scores]) -> None:
    rates = [np.nanmean([np.nanmean(found.p_t < level) for found in null_runs]) for level in (0.05, 0.005)]
    assert 0.025 < rates[0] < 0.075
    assert rates[1] < 0.02


def test_planted_rows_are_found_with_their_sign() -> None:
    strength = torch.zeros(300)
    strength[:10], strength[10:20] = 1.5, -1.5

    def run() -> Iterator[Step]:
        g = np.random.default_rng(0)
        for _ in range(300):
            rows = torch.tensor(g.choice(300, 30, replace=False))
            yield rows, torch.tensor(g.normal(size=(30, 1))) + strength[rows, None], 0.1

    found = scores(FINE(), run(), 300, 1)
    flagged = np.flatnonzero(found.q[:, 0] < 0.05)
    assert set(range(20)) <= set(flagged)
    assert len(flagged) <= 23
    assert (found.mu[:10] > 0).all() and (found.mu[10:20] < 0).all()
    assert (found.p_t[:20] < 1e-4).all()
    assert found.p.min() == pytest.approx(1 / (1 + 20 * 300), rel=1e-9)


def test_auc_error_is_that_of_null_runs_and_max_threshold_claims_none() -> None:
    found = [scores(FINE("auc"), steps(100, 10, 200, 1, s), 100, 1) for s in range(6)]
    z = np.concatenate([f.mu[:, 0] / f.se[:, 0] for f in found])
    assert np.nanstd(z) == pytest.approx(1.0, abs=0.15)
    rough = scores(FINE("max_threshold"), steps(100, 10, 50, 1), 100, 1)
    assert (
        np.isnan(rough.se).all()
        and np.isnan(rough.null_sd).all()
        and np.isfinite(rough.p[rough.observations > 0]).all()
    )
    np.testing.assert_array_equal(rough.p, scores(FINE(), steps(100, 10, 50, 1), 100, 1).p)


def test_null_draws_handed_to_the_report_are_capped_and_standardised() -> None:
    found = scores(FINE(), steps(1000, 100, 60, 2), 1000)
    assert found.null_mu.shape == (2, 10_000)
    assert np.nanstd(found.null_mu) == pytest.approx(1.0, abs=0.03)
