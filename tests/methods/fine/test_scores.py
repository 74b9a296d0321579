"""f-INE's scores: closed forms and retrained truth first, then formulas, invariances, the paper's estimators, units."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from ine_callback.methods.fine import fine as module
from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import Scores
from ine_callback.stats import tradeoff
from ine_callback.stats.hypothesis_tests import moderated_t
from tests.helpers.null_runs import CPU, Step, infos, scores, steps

# -- Gaussian mean estimation: row i has loss (theta - x_i)^2 / 2, the query is theta itself ---------------------------


N, B, ETA, T = 200, 10, 0.02, 300
X = np.sort(np.random.default_rng(0).gamma(2.0, size=N))
KEPT_VARIANCE = (1 - ETA) ** np.arange(
    T - 1, -1, -1.0
)  # what the rest of training leaves of a step: the exact discount


def sgd(runs: int, seed: int, pool: np.ndarray) -> np.ndarray:
    """Final theta of ``runs`` runs that draw each batch from ``pool`` with replacement."""
    g, theta = np.random.default_rng(seed), np.zeros(runs)
    for _ in range(T):
        theta -= ETA * (theta - pool[g.integers(pool.size, size=(runs, B))].mean(1))
    return theta


def recorded(seed: int) -> Scores:
    """One real run of the same SGD, seen by FINE with exactly discounted signals."""
    g, theta = np.random.default_rng(seed), 0.0

    def run() -> Iterator[Step]:
        nonlocal theta
        for kept in KEPT_VARIANCE:
            drawn = g.integers(N, size=B)
            gradients = theta - X[drawn]
            yield torch.tensor(drawn), torch.tensor(kept * gradients / B)[:, None], ETA
            theta -= ETA * gradients.mean()

    return scores(FINE(null_draws=1), run(), N, queries=1)


@pytest.fixture(scope="module")
def recorded_mu() -> np.ndarray:
    return np.nanmean([recorded(seed).mu[:, 0] for seed in range(12)], axis=0)


def test_mu_equals_the_closed_form_of_gaussian_mean_estimation(recorded_mu: np.ndarray) -> None:
    # Removing row i moves theta by (x_i - mean of the others)/N (1 - (1 - eta)^T); theta up is harmful.
    shift = -(X - X.mean()) / (N - 1) * (1 - (1 - ETA) ** T)
    noise = math.sqrt((ETA**2 * KEPT_VARIANCE**2).sum() * X.var() / B)
    closed = shift / noise
    slope = recorded_mu @ closed / (closed @ closed)
    # Twelve runs: slope 1.01, standard error .0075 (measured on 10 sets of twelve); 1/b = .1 would be seen.
    assert slope == pytest.approx(1.0, abs=0.04)
    assert np.corrcoef(recorded_mu, closed)[0, 1] > 0.97


def test_mu_of_a_group_equals_many_real_runs_without_it(recorded_mu: np.ndarray) -> None:
    group = np.arange(N - 10, N)  # the ten largest
    full, without = sgd(4000, 1, X), sgd(4000, 2, np.delete(X, group))
    truth = (without.mean() - full.mean()) / full.std()  # theta is lower without them: harmful, negative
    # Truth -4.49 (standard error .022 at 4,000 runs a side), predicted -4.50 with standard error .11.
    # Removal is N/(N - 10) times replacement by an average row.
    predicted = recorded_mu[group].sum() * N / (N - group.size)
    assert truth < -2
    assert predicted == pytest.approx(truth, rel=0.08)


def test_noise_equals_the_spread_of_real_runs() -> None:
    fine = FINE(null_draws=1)
    fine.start(N, infos(1), CPU)
    g = np.random.default_rng(3)
    for kept in KEPT_VARIANCE:
        drawn = g.integers(N, size=B)
        fine.update(torch.tensor(drawn), torch.tensor(-kept * X[drawn] / B)[:, None], ETA)
    noise = math.sqrt(float(fine.state_dict()["noise"][0]))
    assert noise == pytest.approx(sgd(4000, 4, X).std(), rel=0.08)  # ~ 50 effective steps of 10 rows, gamma tails


# -- formulas, written out ---------------------------------------------------------------------------------------------


def test_accumulators_equal_the_formulas_in_loops() -> None:
    run = list(steps(12, 5, 30, seed=3))
    fine = FINE()
    found = scores(fine, iter(run), 12)
    shift, scatter, variance, noise = np.zeros((12, 2)), np.zeros((12, 2)), np.zeros((12, 2)), np.zeros(2)
    count = np.zeros(12, dtype=int)
    for rows, signals, rate in run:
        c = signals.numpy()
        noise += rate**2 * 5 * c.var(0, ddof=1)
        for k, (row, signals) in enumerate(zip(rows.tolist(), c, strict=True)):
            d = rate * (signals - np.delete(c, k, 0).mean(0))
            sigma2 = rate**2 * c.var(0) * (5 / 4) ** 2
            shift[row] += d
            scatter[row] += d**2 / sigma2
            variance[row] += sigma2
            count[row] += 1
    seen, twice = count > 0, count > 1
    np.testing.assert_array_equal(found.observations, count)
    np.testing.assert_allclose(found.mu[seen], (shift / np.sqrt(noise))[seen], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found.null_sd[seen], np.sqrt(variance / noise)[seen], rtol=1e-5)
    np.testing.assert_allclose(found.t[twice], (found.mu / found.se)[twice], rtol=1e-12)
    for name, expected in (("shift", shift), ("scatter", scatter), ("variance", variance), ("noise", noise)):
        np.testing.assert_allclose(fine.state_dict()[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)
    residual = (scatter[twice] - shift[twice] ** 2 / variance[twice]) / (count[twice, None] - 1)
    for k in range(2):
        fit = moderated_t(shift[twice, k], residual[:, k], count[twice] - 1, variance[twice, k])
        np.testing.assert_allclose(found.t[twice, k], fit.t, rtol=1e-3)
        np.testing.assert_allclose(found.p_t[twice, k], fit.p, rtol=1e-2)
    assert np.isnan(found.mean_loss).all() and found.mean_loss.shape == (12,)


def test_k_equal_steps_give_mu_root_k() -> None:
    step = (torch.arange(6), torch.randn(6, 1), 0.1)
    one, nine = scores(FINE(), iter([step]), 6, 1), scores(FINE(), iter([step] * 9), 6, 1)
    np.testing.assert_allclose(nine.mu, 3 * one.mu, rtol=1e-5)


def test_positive_signal_means_helpful_for_every_estimator() -> None:
    def run() -> Iterator[Step]:
        for t, (rows, signals, rate) in enumerate(steps(40, 8, 400, queries=1, seed=t_seed)):
            yield rows, signals / math.exp(4 * t / 400) + 4.0 * (rows == 7)[:, None] - 4.0 * (rows == 9)[:, None], rate

    t_seed = 5
    for estimator in ("gaussian", "auc", "max_threshold"):
        mu = scores(FINE(estimator), run(), 40, 1).mu[:, 0]  # type: ignore[arg-type]
        assert mu[7] > 0 > mu[9], estimator
    rough = scores(FINE("auc"), run(), 40, 1)
    fine = scores(FINE(), run(), 40, 1)
    # Same scale: within four standard errors of the noisier one.
    assert abs(rough.mu[7, 0] - fine.mu[7, 0]) < 4 * rough.se[7, 0]


# -- invariances -------------------------------------------------------------------------------------------------------


def test_groups_are_additive_and_all_rows_of_all_steps_sum_to_zero() -> None:
    found = scores(FINE(), steps(30, 6, 50), 30)
    np.testing.assert_allclose(np.nansum(found.mu, axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("estimator", ["gaussian", "auc", "max_threshold"])
def test_loss_scale_does_not_matter(estimator: module.Estimator) -> None:
    base = scores(FINE(estimator), steps(20, 6, 60), 20)
    scaled = scores(FINE(estimator), ((r, 1000 * c, rate) for r, c, rate in steps(20, 6, 60)), 20)
    moved = scores(FINE(), ((r, c, 7 * rate) for r, c, rate in steps(20, 6, 60)), 20)
    for name in ("mu", "se", "null_sd", "t", "p_t"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(base, name), rtol=1e-3, atol=1e-5)
        if estimator == "gaussian":
            np.testing.assert_allclose(getattr(moved, name), getattr(base, name), rtol=1e-3, atol=1e-5)


def test_renaming_rows_and_queries_renames_scores() -> None:
    order = torch.randperm(20)
    base = scores(FINE(), steps(20, 6, 60), 20)
    renamed = scores(FINE(), ((order[r], c.flip(1), rate) for r, c, rate in steps(20, 6, 60)), 20)
    for name in ("mu", "t", "null_sd"):
        moved = getattr(renamed, name)[order.numpy()][:, ::-1]
        np.testing.assert_allclose(moved, getattr(base, name), rtol=1e-6)


def test_order_within_a_batch_does_not_matter_and_neither_does_a_common_offset() -> None:
    base = scores(FINE(), steps(20, 6, 60), 20)
    reversed_rows = scores(FINE(), ((r.flip(0), c.flip(0) + 3, rate) for r, c, rate in steps(20, 6, 60)), 20)
    np.testing.assert_allclose(reversed_rows.mu, base.mu, rtol=1e-3, atol=1e-4)


# -- the paper's estimators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["auc", "max_threshold"])
def test_histogram_estimators_equal_explicit_observations(estimator: module.Estimator) -> None:
    run = list(steps(15, 5, 400, queries=1, seed=2))
    found = scores(FINE(estimator), iter(run), 15, 1)
    trend, observed = 0.0, []
    for t, (_, signals, rate) in enumerate(run):
        c = rate * signals.numpy()[:, 0]
        if t:
            observed.append((c.sum() - trend / (1 - 0.9**t)) / math.sqrt(5 * c.var(ddof=1)))
        trend = 0.9 * trend + 0.1 * c.sum()
    x = np.array(observed)
    binned = np.floor(stats.norm.cdf(x) * 64)
    explicit = tradeoff.auc_mu if estimator == "auc" else tradeoff.max_threshold_mu
    for row in range(15):
        inside = np.array([row in rows for rows, _, _ in run[1:]])
        common = inside.sum() / math.sqrt(x.size)
        assert found.mu[row, 0] == pytest.approx(common * explicit(binned[inside], binned[~inside]), abs=1e-6)
        if estimator == "auc":  # what 64 bins lose: ties within a bin
            assert found.mu[row, 0] == pytest.approx(common * explicit(x[inside], x[~inside]), abs=0.02 * common)


# -- units and initial weights -----------------------------------------------------------------------------------------


def test_units_divide_the_signals_and_initial_weights_join_the_noise() -> None:
    """mu = sum(d / unit) / sqrt(1 + dispersion x sum(w / unit^2)), dispersion = variance / mean of the observations."""
    run = list(steps(30, 6, 40))
    units = [torch.tensor([0.5 + t / 40, 2.0]) for t in range(40)]
    fine, plain = FINE(), FINE()
    fine.start(30, infos(2), CPU, random_weights=True)
    plain.start(30, infos(2), CPU)
    for (rows, signals, rate), unit in zip(run, units, strict=True):
        fine.update(rows, signals, rate, unit)
        plain.update(rows, signals / unit, rate)
    found, expected = fine.compute(), plain.compute()
    counts = expected.observations
    dispersion = min(1.0, counts.var() / counts.mean())
    assert 0.2 < dispersion <= 1.0
    noise = plain._state["noise"].double().numpy()
    np.testing.assert_allclose(found.mu, expected.mu * np.sqrt(noise / (1 + dispersion * noise)), rtol=1e-5)
    np.testing.assert_allclose(found.se / found.mu, expected.se / expected.mu, rtol=1e-5)
    np.testing.assert_array_equal(found.p, expected.p)


def test_shuffled_epochs_leave_the_initial_weights_as_the_only_noise() -> None:
    """Every row is observed equally often: the order alone moves a query by little, and mu is the shift in units."""
    fine, g = FINE(), torch.Generator().manual_seed(0)
    fine.start(20, infos(1), CPU, random_weights=True)
    for _ in range(4):
        for rows in torch.randperm(20, generator=g).split(5):
            fine.update(rows, torch.randn(5, 1, generator=g), 0.1, torch.full((1,), 3.0))
    np.testing.assert_allclose(fine.compute().mu, fine._state["shift"].numpy(), rtol=1e-6)
