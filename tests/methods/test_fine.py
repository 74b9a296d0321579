"""f-INE: closed forms and retrained truth first, then invariances, calibration, and life in a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ine_callback.methods.fine import fine as module
from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import QueryInfo, Scores
from ine_callback.stats import tradeoff
from ine_callback.stats.hypothesis_tests import moderated_t, uniformity_p

CPU = torch.device("cpu")
Step = tuple[Tensor, Tensor, float]


def infos(count: int) -> tuple[QueryInfo, ...]:
    return tuple(QueryInfo(f"q{k}", "loss", "Does training on the row lower the loss?") for k in range(count))


def steps(rows: int, batch: int, count: int, queries: int = 2, seed: int = 0, heavy: bool = False) -> Iterator[Step]:
    """A null run: signals know nothing of their row; shifts grow 50-fold, rows are drawn with unequal chances."""
    g = np.random.default_rng(seed)
    chances = g.gamma(1.5, size=rows)
    for t in range(count):
        drawn = g.choice(rows, batch, replace=False, p=chances / chances.sum())
        noise = g.standard_t(3, size=(batch, queries)) if heavy else g.normal(size=(batch, queries))
        yield torch.tensor(drawn), torch.tensor(noise * math.exp(4 * t / count) + 1.0), 0.1


def scores(fine: FINE, run: Iterator[Step], rows: int, queries: int = 2) -> Scores:
    fine.start(rows, infos(queries), CPU)
    for step in run:
        fine.update(*step)
    return fine.compute()


def equal(one: Scores, other: Scores) -> None:
    for field in dataclasses.fields(Scores)[1:]:
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


# ---- Gaussian mean estimation: row i has loss (theta - x_i)^2 / 2, the query is theta itself -------------------------

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


# ---- formulas, written out ------------------------------------------------------------------------------------------


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


def test_permuted_shifts_have_the_exact_variance_and_sum_to_zero() -> None:
    fine = FINE(null_draws=2000)
    fine.start(4, infos(1), CPU)
    fine.update(torch.arange(4), torch.tensor([[1.0], [2.0], [4.0], [10.0]]), 0.5)
    state = fine.state_dict()
    permuted = state["null"][:4, :, 0]
    np.testing.assert_allclose(permuted.sum(0), 0, atol=1e-5)
    np.testing.assert_allclose(permuted.var(1, unbiased=False), state["variance"][:, 0], rtol=0.1)
    np.testing.assert_allclose(permuted.unique(), np.array([-1.625, -1.125, -0.125, 2.875]) * 4 / 3, rtol=1e-6)


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


# ---- invariances ----------------------------------------------------------------------------------------------------


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


# ---- tests: calibration and power -----------------------------------------------------------------------------------


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


# ---- the paper's estimators -----------------------------------------------------------------------------------------


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


# ---- life in a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["gaussian", "auc", "max_threshold"])
def test_resumed_run_equals_uninterrupted_run(estimator: module.Estimator, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = list(steps(25, 6, 40))
    whole = scores(FINE(estimator), iter(run), 25)
    first = FINE(estimator)
    first.start(25, infos(2), CPU)
    for step in run[:17]:
        first.update(*step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    snapshot = first.state_dict()
    for step in run[17:]:
        first.update(*step)
    equal(first.compute(), whole)
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), snapshot):
        second = FINE(estimator)
        second.start(25, infos(2), CPU)
        second.load_state_dict(state)
        for step in run[17:]:
            second.update(*step)
        equal(second.compute(), whole)


def test_finish_may_be_called_during_the_run() -> None:
    run, fine = list(steps(25, 6, 40)), FINE()
    fine.start(25, infos(2), CPU)
    for step in run:
        fine.update(*step)
        if len(run) > 30:
            fine.compute()
    equal(fine.compute(), scores(FINE(), iter(run), 25))


def test_grown_state_equals_one_that_was_large_from_the_start() -> None:
    run = list(steps(25, 6, 40))
    fine = FINE("auc")
    fine.start(0, infos(2), CPU)
    for rows, signals, rate in run:
        fine.grow(int(rows.max()) + 1)
        fine.update(rows, signals, rate)
    fine.grow(25)
    equal(fine.compute(), scores(FINE("auc"), iter(run), 25))


def test_null_stays_under_its_cap_and_keeps_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NULL_DRAWS", 256)
    fine = FINE()
    fine.start(10, infos(1), CPU)
    assert fine.state_dict()["null"].shape == (11, 21, 1)
    for step in steps(10, 5, 20, 1):
        fine.update(*step)
    fine.grow(100)
    assert fine.state_dict()["null"].shape == (101, 3, 1)
    fine.grow(500)
    assert fine.state_dict()["null"].shape == (126, 3, 1)
    for step in steps(500, 100, 20, 1):
        fine.update(*step)
    every_fourth = fine.state_dict()["null"][:-1]
    fine.grow(1000)
    state = fine.state_dict()
    assert torch.equal(state["null"][:63], every_fourth[::2])
    assert (state["stride"], state["draws"], state["null"].shape[0]) == (8, 2, 126)
    for step in steps(1000, 100, 200, 1, heavy=True):
        fine.update(*step)
    found = fine.compute()
    assert uniformity_p(found.p) > 0.001 and found.null_ks_p[0] > 0.01
    resumed = FINE()
    resumed.start(1000, infos(1), CPU)
    resumed.load_state_dict(fine.state_dict())
    equal(resumed.compute(), found)


def test_nonfinite_signals_are_left_out_per_query_and_counted() -> None:
    clean = list(steps(20, 6, 60))
    dirty = [(r, c.clone(), rate) for r, c, rate in clean]
    for value, at in ((math.nan, 3), (math.inf, 9), (-math.inf, 9), (1e30, 20)):
        dirty[at][1][int(value == -math.inf), 1] = value
    fine = FINE("auc")
    found = scores(fine, iter(dirty), 20)
    base = scores(FINE("auc"), iter(clean), 20)
    assert fine.nonfinite.tolist() == [0, 4]
    np.testing.assert_array_equal(found.mu[:, 0], base.mu[:, 0])
    seen = base.observations > 0
    assert np.isfinite(found.mu[seen]).all() and np.isfinite(found.p[seen]).all()
    part = scores(FINE(), iter([(torch.arange(4), torch.tensor([[1.0], [2.0], [math.nan], [6.0]]), 1.0)]), 4, 1)
    np.testing.assert_allclose(part.mu[:, 0] * math.sqrt(4 * 7.0), [-3, -1.5, 0, 4.5], rtol=1e-6)


def test_query_without_a_finite_or_varying_signal_is_nan_and_harms_no_other() -> None:
    run = [
        (r, torch.stack([c[:, 0], torch.full((6,), v)], 1), rate)
        for r, c, rate in steps(20, 6, 60)
        for v in (math.nan,)
    ]
    found = scores(FINE(), iter(run), 20)
    np.testing.assert_allclose(found.mu[:, 0], scores(FINE(), steps(20, 6, 60), 20).mu[:, 0])
    for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd"):
        assert np.isnan(getattr(found, name)[:, 1]).all(), name
    assert math.isnan(found.null_ks_p[1])


def test_single_row_steps_and_rate_zero_count_but_inform_nothing() -> None:
    run = list(steps(20, 6, 60))
    idle = [(torch.tensor([4]), torch.tensor([[50.0, -3.0]]), 0.1), (torch.arange(6), torch.randn(6, 2), 0.0)]
    base, found = scores(FINE(), iter(run), 20), scores(FINE(), iter(run[:30] + idle + run[30:]), 20)
    assert found.observations[4] == base.observations[4] + 2
    for name in ("mu", "p", "t", "se"):
        np.testing.assert_array_equal(getattr(found, name), getattr(base, name))
    alone = scores(FINE(), iter([(torch.tensor([k % 3]), torch.randn(1, 2), 0.1) for k in range(9)]), 3)
    assert alone.observations.tolist() == [3, 3, 3] and np.isnan(alone.mu).all() and np.isnan(alone.p).all()


def test_unseen_rows_are_nan_and_one_observation_has_no_t() -> None:
    run = [(torch.tensor([0, 1, 2]), torch.randn(3, 1), 0.1), (torch.tensor([0, 1, 3]), torch.randn(3, 1), 0.1)]
    found = scores(FINE(), iter(run), 5, 1)
    assert found.observations.tolist() == [2, 2, 1, 1, 0]
    for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd"):
        assert math.isnan(getattr(found, name)[4, 0]), name
    assert np.isnan(found.t[2:]).all() and np.isfinite(found.t[:2]).all()
    assert np.isfinite(found.p[:4]).all()
    empty = scores(FINE("auc"), iter([]), 5)
    assert np.isnan(empty.mu).all() and empty.null_mu.shape == (2, 0) and np.isnan(empty.null_ks_p).all()


def test_duplicate_rows_of_a_step_count_twice() -> None:
    found = scores(FINE(), iter([(torch.tensor([0, 0, 1]), torch.tensor([[2.0], [3.0], [1.0]]), 1.0)]), 2, 1)
    assert found.observations.tolist() == [2, 1]
    np.testing.assert_allclose(found.mu[:, 0] * math.sqrt(3 * 1.0), [1.5, -1.5], rtol=1e-6)


def test_null_draws_handed_to_the_report_are_capped_and_standardised() -> None:
    found = scores(FINE(), steps(1000, 100, 60, 2), 1000)
    assert found.null_mu.shape == (2, 10_000)
    assert np.nanstd(found.null_mu) == pytest.approx(1.0, abs=0.03)


def test_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    scores(FINE("auc"), steps(20, 6, 20), 20)
    assert torch.equal(torch.get_rng_state(), before)
    seeds = [scores(FINE(seed=s), steps(20, 6, 20), 20) for s in (0, 0, 1)]
    equal(seeds[0], seeds[1])
    assert (seeds[0].null_mu != seeds[2].null_mu).any() and np.array_equal(seeds[0].mu, seeds[2].mu, equal_nan=True)


class _HostReads(TorchDispatchMode):
    """Refuses every operation that waits for the device or whose shape depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}, name
        if name in {"index", "index_put_"}:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["gaussian", "auc", "max_threshold"])
def test_fold_never_waits_for_the_device_and_allocates_nothing_lasting(estimator: module.Estimator) -> None:
    fine = FINE(estimator)
    fine.start(20, infos(2), CPU)
    before = {name: (value.data_ptr(), value.shape) for name, value in fine._state.items()}
    run = list(steps(20, 6, 20))
    with _HostReads():
        for step in run:
            fine.update(*step)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            run[0][1].sum().item()
    assert {name: (value.data_ptr(), value.shape) for name, value in fine._state.items()} == before


def test_half_precision_signals_and_gradient_graphs_are_accepted() -> None:
    run = [(r, c.to(torch.bfloat16).requires_grad_(), rate) for r, c, rate in steps(20, 6, 30)]
    found = scores(FINE(), iter(run), 20)
    base = scores(FINE(), ((r, c.detach().double(), rate) for r, c, rate in run), 20)
    np.testing.assert_allclose(found.mu, base.mu, rtol=1e-5)


def test_mistakes_are_named_with_their_remedy() -> None:
    with pytest.raises(ValueError, match=r"estimator='mean'.*gaussian"):
        FINE("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null_draws=0"):
        FINE(null_draws=0)
    with pytest.raises(ValueError, match="seed=-1"):
        FINE(seed=-1)
    fine = FINE()
    with pytest.raises(RuntimeError, match=r"FINE.update: no state yet; call start"):
        fine.update(torch.arange(2), torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match="queries is empty"):
        fine.start(3, (), CPU)
    fine.start(3, infos(2), CPU)
    with pytest.raises(ValueError, match=r"signals \(2, 1\)"):
        fine.update(torch.arange(2), torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match="rate=nan"):
        fine.update(torch.arange(2), torch.zeros(2, 2), math.nan)
    other = FINE("auc")
    other.start(3, infos(2), CPU)
    with pytest.raises(ValueError, match="resume with the same settings"):
        other.load_state_dict(fine.state_dict())


def test_command_line_configuration_builds_the_method() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FINE, "fine")
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    built = build(parser.parse_args(["--fine.estimator=auc", "--fine.null_draws=5"])).fine
    assert (built.estimator, built.null_draws, built.seed) == ("auc", 5, 0)
    with pytest.raises(Exception, match="estimator"):
        parser.parse_args(["--fine.estimator=mean"])


# ---- units and initial weights ---------------------------------------------------------------------------------------


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


# ---- self-influence --------------------------------------------------------------------------------------------------


def own_run(random_weights: bool = True, rate: float = 0.1) -> tuple[FINE, list[tuple[Tensor, Tensor, Tensor]]]:
    """12 rows, 4 shuffled epochs in batches of 4; the signals shrink tenfold an epoch, each row has its own unit."""
    self_query = QueryInfo("self", "self", "?")
    fine, g = FINE(), torch.Generator().manual_seed(0)
    fine.start(12, (*infos(1), self_query), CPU, random_weights)
    run = []
    for epoch in range(4):
        for rows in torch.randperm(12, generator=g).split(4):
            signals = torch.rand(4, 2, generator=g) / 10**epoch
            units = torch.rand(4, 2, generator=g) + 0.5
            units[:, 0] = 2.0
            fine.update(rows, signals, rate, units)
            run.append((rows, signals, units))
    return fine, run


def test_self_influence_is_the_mean_ratio_to_the_batch_on_the_rows_own_profile() -> None:
    fine, run = own_run()
    ratios, profile, others = torch.zeros(12), torch.zeros(12), torch.zeros(12)
    for rows, signals, units in run:
        predicted = 0.1 * signals[:, 1] / units[:, 1]
        mean = predicted.mean()
        for k, row in enumerate(rows):
            rest = (predicted.sum() - predicted[k]) / 3
            ratios[row] += (predicted[k] - rest) / mean / 4
            profile[row] += mean
        d = 0.1 * signals[:, 0] / 2.0
        others[rows] += d - (d.sum() - d) / 3
    found = fine.compute()
    np.testing.assert_allclose(found.mu[:, 1], ratios * profile, rtol=2e-5)
    np.testing.assert_allclose(found.mu[:, 0], others, rtol=2e-5, atol=1e-7)
    (note,) = fine.notes()
    assert f"{float(profile.mean()):.2g} standard deviations" in note


def test_self_influence_does_not_depend_on_how_signals_shrink() -> None:
    """Its tests and its ranking are those of ratios: a common factor of a step drops out of t."""
    fine, run = own_run()
    other = FINE()
    other.start(12, (*infos(1), QueryInfo("self", "self", "?")), CPU, True)
    for step, (rows, signals, units) in enumerate(run):
        other.update(rows, signals * (1 + step), 0.1, units)
    np.testing.assert_allclose(other.compute().t[:, 1], fine.compute().t[:, 1], rtol=1e-4)
    assert not np.allclose(other.compute().t[:, 0], fine.compute().t[:, 0], rtol=1e-2)


def test_self_influence_of_a_climbing_run_is_the_negative() -> None:
    found, climbing = own_run()[0].compute(), own_run(rate=-0.1)[0].compute()
    np.testing.assert_array_equal(climbing.mu, -found.mu)
    np.testing.assert_array_equal(climbing.t, -found.t)


def test_self_influence_survives_a_checkpoint_and_growth() -> None:
    fine, _ = own_run()
    again = FINE()
    again.start(20, (*infos(1), QueryInfo("self", "self", "?")), CPU, True)
    again.load_state_dict(fine.state_dict())
    np.testing.assert_array_equal(again.compute().mu[:12], fine.compute().mu)
    assert np.isnan(again.compute().mu[12:]).all()


def test_only_self_influence_from_random_weights_has_a_note() -> None:
    fine = FINE()
    fine.start(3, infos(1), CPU, True)
    assert fine.notes() == []
    assert own_run(random_weights=False)[0].notes() == []
