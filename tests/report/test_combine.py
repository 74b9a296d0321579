"""Several runs as one report: formulas by loops, calibration by simulation, what cannot be combined."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, fmean, variance

import numpy as np
import pytest
from scipy import stats

from ine_callback.report import InfluenceReport, RunInfo, example_report
from ine_callback.report.combine import combine_scores
from ine_callback.scores import QueryInfo, Scores
from ine_callback.stats.hypothesis_tests import benjamini_hochberg, fit_variance_prior

NORMAL = NormalDist()


def run_of(random: np.random.Generator, true: np.ndarray, sd: np.ndarray | float = 1.0, draws: int = 500) -> Scores:
    """A run that measures ``true`` [N, Q] with Gaussian noise of the known ``sd``."""
    n, q = true.shape
    scale = np.broadcast_to(sd, true.shape)
    z = (true + scale * random.standard_normal(true.shape)) / scale
    p = 2 * stats.norm.sf(np.abs(z))
    return Scores(
        queries=tuple(QueryInfo(f"q{k}", "loss", "?") for k in range(q)),
        mu=z * scale,
        se=scale * random.uniform(0.8, 1.2, true.shape),
        p=p,
        q=benjamini_hochberg(p),
        t=z,
        p_t=p,
        null_sd=scale.copy(),
        observations=random.integers(1, 9, n),
        mean_loss=random.gamma(2.0, 1.0, n),
        null_mu=random.standard_normal((q, draws)),
        null_ks_p=random.uniform(0.2, 1.0, q),
    )


def without(scores: Scores, row: int) -> Scores:
    """The scores as if the row had never been observed."""
    arrays = {name: getattr(scores, name).copy() for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd", "mean_loss")}
    for array in arrays.values():
        array[row] = np.nan
    seen = scores.observations.copy()
    seen[row] = 0
    return replace(scores, observations=seen, **arrays)


def combined(runs: list[Scores]) -> InfluenceReport:
    return InfluenceReport.combine([InfluenceReport(run) for run in runs])


def test_every_number_by_loops() -> None:
    random = np.random.default_rng(0)
    true, sd = random.normal(0, 2, (30, 2)), random.uniform(0.5, 3.0, (30, 2))
    runs = [run_of(random, true, sd) for _ in range(4)]
    runs[1] = without(runs[1], 5)  # three runs saw it
    runs = [without(run, 6) if r else run for r, run in enumerate(runs)]  # one run saw it
    runs = [without(run, 7) for run in runs]  # none did
    result = combined(runs).scores
    for k in range(2):
        mu = [[float(run.mu[i, k]) for run in runs if run.observations[i]] for i in range(30)]
        units = [
            fmean([float(run.se[i, k]) ** 2 for run in runs if run.observations[i]] or [math.nan]) for i in range(30)
        ]
        several = [i for i in range(30) if len(mu[i]) > 1]
        ratios = {i: variance(mu[i]) / units[i] for i in several}
        d0, s2 = fit_variance_prior(list(ratios.values()), [len(mu[i]) - 1 for i in several])
        assert d0 > 0
        for i in range(30):
            here = {name: float(getattr(result, name)[i, k]) for name in ("mu", "se", "p", "t", "p_t", "null_sd")}
            if not mu[i]:
                assert all(map(math.isnan, here.values()))
                continue
            size = len(mu[i])
            seen = [run for run in runs if run.observations[i]]
            z = [math.copysign(-NORMAL.inv_cdf(float(run.p[i, k]) / 2), float(run.mu[i, k])) for run in seen]
            assert here["mu"] == pytest.approx(fmean(mu[i]))
            assert here["p"] == pytest.approx(2 * NORMAL.cdf(-abs(sum(z)) / math.sqrt(size)), rel=1e-6)
            assert here["null_sd"] == pytest.approx(
                math.sqrt(sum(float(run.null_sd[i, k]) ** 2 for run in seen)) / size
            )
            if size == 1:
                assert math.isnan(here["se"]) and math.isnan(here["t"]) and math.isnan(here["p_t"])
                assert here["p"] == pytest.approx(float(seen[0].p[i, k]))
                continue
            shrunk = s2 if math.isinf(d0) else (d0 * s2 + (size - 1) * ratios[i]) / (d0 + size - 1)
            df = min(d0 + size - 1, sum(len(mu[j]) - 1 for j in several))
            assert here["se"] == pytest.approx(math.sqrt(shrunk * units[i] / size))
            assert here["t"] == pytest.approx(here["mu"] / here["se"])
            assert here["p_t"] == pytest.approx(2 * stats.t.sf(abs(here["t"]), df))
        assert result.null_ks_p[k] == pytest.approx(min(1.0, 4 * min(run.null_ks_p[k] for run in runs)))
    np.testing.assert_allclose(result.q, benjamini_hochberg(result.p))
    for i in range(30):
        times = [int(run.observations[i]) for run in runs]
        loss = sum(n * float(run.mean_loss[i]) for n, run in zip(times, runs, strict=True) if n)
        assert result.observations[i] == sum(times)
        assert (
            np.isnan(result.mean_loss[i]) if not sum(times) else result.mean_loss[i] == pytest.approx(loss / sum(times))
        )


def test_without_errors_within_the_runs_the_plain_variance_is_shrunk() -> None:
    random = np.random.default_rng(1)
    runs = [run_of(random, np.zeros((40, 1))) for _ in range(3)]
    runs = [replace(run, se=np.full_like(run.se, np.nan)) for run in runs]
    spread = np.stack([run.mu for run in runs]).var(0, ddof=1)[:, 0]
    d0, s2 = fit_variance_prior(spread, 2)
    expected = np.full(40, s2) if math.isinf(d0) else (d0 * s2 + 2 * spread) / (d0 + 2)
    np.testing.assert_allclose(combine_scores(runs).se[:, 0], np.sqrt(expected / 3))


def test_columns_follow_the_first_run() -> None:
    random = np.random.default_rng(2)
    a, b, c = (run_of(random, np.zeros((9, 3))) for _ in range(3))
    turned = [1, 2, 0]
    arrays = {name: getattr(b, name)[:, turned] for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd")}
    other = replace(
        b,
        queries=tuple(b.queries[k] for k in turned),
        null_mu=b.null_mu[turned],
        null_ks_p=b.null_ks_p[turned],
        **arrays,
    )
    here, there = combine_scores([a, b, c]), combine_scores([a, other, c])
    for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd", "null_mu", "null_ks_p"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    notes = [combined(runs).run.notes for runs in ([a, b, c], [a, other, c])]
    assert notes[0] == notes[1]


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_tests_are_uniform_under_the_null(runs: int) -> None:
    """20 trials of 2,000 rows that do nothing, with a scale of their own each: p, and p_t through its moderation.

    p_t shares one estimated prior: with 400 rows and two runs its common error alone would fail one trial in five.
    """
    found: dict[str, list[np.ndarray]] = {"p": [], "p_t": []}
    for seed in range(20):
        random = np.random.default_rng(seed)
        sd = np.exp(random.normal(0, 0.5, (2000, 1)))
        result = combine_scores([run_of(random, np.zeros((2000, 1)), sd) for _ in range(runs)])
        for name, values in found.items():
            values.append(getattr(result, name)[:, 0])
    for name, values in found.items():
        ks = sorted(float(stats.kstest(each, "uniform").pvalue) for each in values)
        assert sum(p < 0.01 for p in ks) <= 1, (name, ks)
        assert np.mean(np.stack(values) <= 0.05) == pytest.approx(0.05, abs=0.005)
        assert np.mean(np.stack(values) <= 0.001) == pytest.approx(0.001, abs=0.0006)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_intervals_cover_the_true_mean(runs: int) -> None:
    """95 % intervals of 6,000 rows, also of the tenth with the largest scores, which vary most."""
    random = np.random.default_rng(3)
    true = random.normal(0, 1, (6000, 1)) ** 3
    sd = 0.3 + np.abs(true)
    result = combine_scores([run_of(random, true, sd) for _ in range(runs)])
    covered = np.abs(result.mu - true) <= 1.96 * result.se
    large = np.abs(true) >= np.quantile(np.abs(true), 0.9)
    assert 0.93 < covered.mean() < 0.97
    assert 0.90 < covered[large].mean() < 0.98  # shrinking without the rows' own units: .57 to .83


def test_the_mean_of_three_runs_is_closer_than_one() -> None:
    random = np.random.default_rng(4)
    true = random.normal(0, 1, (500, 1))
    runs = [run_of(random, true) for _ in range(3)]
    errors = [np.square(run.mu - true).mean() for run in runs]
    assert np.square(combine_scores(runs).mu - true).mean() == pytest.approx(fmean(errors) / 3, rel=0.15)


def test_runs_that_disagree_in_sign_cancel() -> None:
    random = np.random.default_rng(5)
    true = np.zeros((50, 1))
    true[:2] = 6.0
    runs = [run_of(random, true * sign, sd) for sign, sd in ((1, 1.0), (1, 1.0))]
    turned = replace(runs[1], mu=runs[1].mu.copy(), t=runs[1].t.copy())
    turned.mu[0] *= -1
    turned.t[0] *= -1
    result = combine_scores([runs[0], turned])
    assert max(run.p[0, 0] for run in (runs[0], turned)) < 1e-4
    assert result.p[0, 0] > 0.05 and result.p_t[0, 0] > 0.05
    assert result.p[1, 0] < 1e-8 and result.q[1, 0] < 1e-6 and result.p_t[1, 0] < 0.01


def test_the_sign_is_that_of_the_tested_shift() -> None:
    """Of the paper's estimators mu is not the tested shift, t is."""
    random = np.random.default_rng(6)
    a, b = (run_of(random, np.full((5, 1), 4.0)) for _ in range(2))
    other = replace(b, mu=-b.mu)
    np.testing.assert_array_equal(combine_scores([a, other]).p, combine_scores([a, b]).p)


def test_null_draws_are_those_of_the_combined_score() -> None:
    random = np.random.default_rng(7)
    runs = [run_of(random, np.zeros((5, 2)), draws=m) for m in (20_000, 10_000, 0)]
    skewed = [replace(run, null_mu=np.sign(run.null_mu) * np.sqrt(2) * (run.null_mu > 0)) for run in runs]
    result = combine_scores(skewed)
    assert result.null_mu.shape == (2, 20_000)
    # Two draws of 0 or sqrt(2), half each: sums over sqrt(2) are 0, 1 and 2.
    for draws in result.null_mu:
        shares = [float(np.isclose(draws, value).mean()) for value in (0, 1, 2)]
        assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    np.testing.assert_array_equal(result.null_mu, combine_scores(skewed).null_mu)
    assert combine_scores([replace(run, null_mu=np.empty((2, 0))) for run in runs]).null_mu.shape == (2, 0)


def test_runs_without_a_scale_are_no_evidence() -> None:
    random = np.random.default_rng(8)
    a, b, c = (run_of(random, np.ones((6, 2))) for _ in range(3))
    hollow = {name: getattr(c, name).copy() for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd", "null_mu")}
    for name, array in hollow.items():
        array[(slice(None), 1) if name != "null_mu" else 1] = np.nan
    checks = np.array([c.null_ks_p[0], np.nan])
    result, two = combine_scores([a, b, replace(c, null_ks_p=checks, **hollow)]), combine_scores([a, b])
    for name in ("mu", "se", "p", "t", "p_t", "null_sd"):
        np.testing.assert_array_equal(getattr(result, name)[:, 1], getattr(two, name)[:, 1])
        assert np.isfinite(getattr(result, name)).all()
    assert result.null_ks_p[1] == two.null_ks_p[1]


def test_notes_count_what_repeats() -> None:
    random = np.random.default_rng(9)
    runs = [run_of(random, np.zeros((6, 6))) for _ in range(3)]
    flags = np.array([[1, 1, 1], [1, 1, -1], [0, 1, 0], [0, 0, 0], [-1, -1, -1], [1, 1, 0]], dtype=float)
    for r, run in enumerate(runs):
        run.q[:] = np.where(flags[:, r, None] != 0, 0.05, 0.06)
        run.mu[:] = np.where(flags[:, r, None] < 0, -1.0, 1.0) * np.abs(run.mu)
    text = "of {} {} flagged (q ≤ 0.05) in any run, {} are flagged in all 3 with the same sign."
    notes = combined(runs).run.notes
    assert notes[1:] == [
        *(f"Query 'q{k}': " + text.format(5, "rows", 2) for k in range(4)),
        "All 6 queries: " + text.format(30, "scores", 12),
        "sizes are predicted by single runs: no query's spread was measured",
    ]


def test_provenance_is_summed_and_united() -> None:
    random = np.random.default_rng(10)
    scores = [run_of(random, np.zeros((6, 1))) for _ in range(3)]
    infos = [
        RunInfo(
            config={"refresh_every": 20},
            versions={"torch": "2.6"},
            seed=seed,
            started=f"2026-01-0{4 - seed}T00:00:00+00:00",
            seconds=2.0,
            steps=10,
            rows=6,
            captured_share=1 - seed / 10,
            approximate={"bn": f"why {seed}"},
            uncaptured={f"scale{seed}": "bare"},
            nonfinite={"q0": seed},
            schedule={"steps": 10},
            notes=["the same", f"own {seed}"],
        )
        for seed in (1, 2, 3)
    ]
    run = InfluenceReport.combine([InfluenceReport(*pair) for pair in zip(scores, infos, strict=True)]).run
    assert run.config == {"refresh_every": 20, "combined": 3, "seeds": [1, 2, 3]} and run.seed is None
    assert (run.steps, run.seconds, run.rows, run.captured_share) == (30, 6.0, 6, 0.7)
    assert run.started == "2026-01-01T00:00:00+00:00" and run.versions == {"torch": "2.6"}
    assert run.approximate == {"bn": "why 1"} and set(run.uncaptured) == {"scale1", "scale2", "scale3"}
    assert run.nonfinite == {"q0": 6} and run.schedule == {"steps": 10}
    assert run.notes[-4:] == ["the same", "own 1", "own 2", "own 3"] and "seeds: 1, 2, 3" in run.notes[0]
    infos[2] = replace(infos[2], config={"refresh_every": 1}, versions={"torch": "2.7"}, schedule={"steps": 9})
    run = InfluenceReport.combine([InfluenceReport(*pair) for pair in zip(scores, infos, strict=True)]).run
    assert "settings differ (refresh_every)" in run.notes[1]
    assert run.versions == {"torch": "2.6, 2.7"}
    assert run.schedule == {"runs": [{"steps": 10}, {"steps": 10}, {"steps": 9}]}


def test_what_cannot_be_combined_is_told_with_a_remedy() -> None:
    one, two = example_report(seed=1), example_report(seed=2)
    combine = InfluenceReport.combine
    with pytest.raises(ValueError, match=r"InfluenceReport.combine: got 1 report\(s\); give at least two"):
        combine([one])
    with pytest.raises(ValueError, match="report 0 has 60 rows, report 1 50; give runs of the same training set"):
        combine([one, example_report(rows=50, seed=2)])
    other = (replace(two.scores.queries[0], name="own"), replace(two.scores.queries[1], kind="margin"))
    strange = InfluenceReport(replace(two.scores, queries=(*other, two.scores.queries[2])), two.run)
    with pytest.raises(ValueError, match="different queries") as error:
        combine([one, strange])
    assert "only report 0 has ['self (self)', 'val (loss)']" in str(error.value)
    assert "only report 1 has ['own (self)', 'val (margin)']" in str(error.value)
    with pytest.raises(
        ValueError, match="reports 0 and 2 are equal: the same run twice gives no error bars: give another"
    ):
        combine([one, two, example_report(seed=1)])
    with pytest.raises(ValueError, match="report 1 is combined already; give the reports of the single runs"):
        combine([example_report(seed=3), combine([one, two])])


def test_a_combined_report_saves_and_shows_like_any_other(tmp_path: Path) -> None:
    report = InfluenceReport.combine([example_report(seed=seed) for seed in (1, 2, 3)])
    again = InfluenceReport.load(report.save(tmp_path / "report"))
    assert again.run == report.run
    np.testing.assert_array_equal(again.scores.mu, report.scores.mu)
    np.testing.assert_array_equal(again.scores.se, report.scores.se)
    assert again.unseen.tolist() == [59] and again.drop_list().tolist() == report.drop_list().tolist() == [3, 17, 29]
    shown = " ".join(str(report).split())
    assert "Combined from 3 runs (seeds: 1, 2, 3)" in shown and "in all 3 with the same sign" in shown
    text = report.write_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "recorded in 3 runs." in text and "from the scatter between the runs." in text
    single = example_report().write_html(tmp_path / "single.html").read_text(encoding="utf-8")
    assert "recorded in one run." in single and "contrasts between each layer's units" in single.replace("&#39;", "'")
    assert "Combined from 3 runs" in report._repr_html_()
    assert report.group([3, 17, 29], "self").p < 1e-9
