"""The list of label errors: its statistics on synthetic margins, its words, and where reports use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from ine_callback.applications.label_errors import increasing, suspicion
from ine_callback.report import InfluenceReport, example_report
from ine_callback.report.answers import answers
from ine_callback.scores import WINDOWS, Floats, Scores

N = 4000


def margins_of(seed: int, wrong: float, hard: float = 0.05, visits: int = 4) -> tuple[Floats, Floats]:
    """Mean margins [N, 8] of rows of a well-trained network, and which labels are wrong.

    A row's sureness is exponential; hard rows have little of it. The model errs on a right label with the probability
    that it gives itself, and a wrong label's margin is the same with the other sign.
    """
    random = np.random.default_rng(seed)
    sure = np.where(random.random(N) < hard, random.exponential(1.0, N), 2.5 + random.exponential(2.0, N))
    right = random.random(N) < 1 / (1 + np.exp(-sure))
    bad = random.random(N) < wrong
    margin = np.where(right != bad, sure, -sure)
    out = np.full((N, WINDOWS), np.nan)
    out[:, :visits] = margin[:, None]
    out[:, 0] = random.standard_normal(N)
    return out, bad


def report_of(margins: Floats, **other: Any) -> InfluenceReport:
    scores = example_report(rows=len(margins) + 1, planted=()).scores
    return InfluenceReport(replace(scores.first(len(margins)), margins=margins, **other))


@pytest.mark.parametrize(
    ("wrong", "q", "recall"), [(0.02, 0.1, 0.15), (0.1, 0.1, 0.3), (0.1, 0.05, 0.25), (0.3, 0.1, 0.5)]
)
def test_the_rate_holds_and_wrong_labels_are_found(wrong: float, q: float, recall: float) -> None:
    rates, recalls, noise = [], [], []
    for seed in range(12):
        margins, bad = margins_of(seed, wrong)
        found = report_of(margins).label_errors(q)
        assert (
            not found.rate > q and (np.diff(found.probability) <= 0).all() and len(np.unique(found.rows)) == len(found)
        )
        if len(found):
            rates.append(1 - bad[found.rows].mean())
        recalls.append(bad[found.rows].sum() / bad.sum())
        noise.append(found.noise)
    assert np.mean(rates) < q + 0.02 + 2 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(recalls) > recall
    assert np.mean(noise) == pytest.approx(wrong, rel=0.35)


def test_clean_data_gives_hardly_a_row() -> None:
    listed = [len(report_of(margins_of(seed, 0.0)[0]).label_errors()) for seed in range(12)]
    assert np.mean(listed) < 0.003 * N and max(listed) < 0.01 * N


def test_learnt_wrong_labels_are_found_in_an_earlier_window() -> None:
    margins, bad = margins_of(0, 0.1)
    margins[:, 3:6] = np.abs(margins[:, 2:3]) + 1  # in the end every label is known by heart
    found = report_of(margins).label_errors()
    assert found.visits == (3, 4) and bad[found.rows].mean() > 0.75


def test_what_cannot_be_told_is_said() -> None:
    random = np.random.default_rng(0)
    noise = np.full((N, WINDOWS), np.nan)
    noise[:, :3] = random.standard_normal((N, 3)) - 1.3  # nine of ten labels lose, as with random ones
    found = report_of(noise).label_errors()
    assert len(found) == 0 and "disagreed with most labels" in found.note and np.isnan(found.noise)
    hard, _ = margins_of(0, 0.0, hard=0.9)  # a fifth of the rows disagree, none of them for its label
    found = report_of(hard).label_errors()
    assert len(found) == 0 and "own errors outnumber" in found.note
    once = np.full((N, WINDOWS), np.nan)
    once[:, 0] = random.standard_normal(N)
    found = report_of(once).label_errors()
    assert len(found) == 0 and "visited once" in found.note and "No label is listed" in str(found)
    heart = np.full((N, WINDOWS), np.nan)
    heart[:, 1] = random.exponential(1.0, N)
    heart[: N // 5, 1] *= -0.01
    heart[:, 2] = 8.0
    assert "by heart" in report_of(heart).label_errors().note
    half, _ = margins_of(0, 0.45)
    assert "often sure and wrong itself" in report_of(half).label_errors().note
    assert not report_of(margins_of(0, 0.1)[0]).label_errors().note
    assert "no one label a row" in example_report().label_errors().note
    with pytest.raises(ValueError, match="q is 2"):
        report_of(once).label_errors(2.0)


def test_few_rows_and_odd_ones() -> None:
    for n in (1, 2, 16, 40):
        margins = np.full((n, WINDOWS), np.nan)
        margins[:, :2] = -1.0
        assert len(report_of(margins).label_errors()) == 0
    margins, _ = margins_of(0, 0.1)
    margins[::7] = np.nan
    assert not set(report_of(margins).label_errors().rows.tolist()) & set(range(0, N, 7))


def test_drop_and_keep_lists_are_the_label_errors() -> None:
    margins, _ = margins_of(1, 0.1)
    report = report_of(margins)
    rows = report.label_errors().rows
    assert np.array_equal(report.drop_list(), rows) and np.array_equal(
        report.drop_list(0.02), rows[: len(report.drop_list(0.02))]
    )
    assert sorted([*report.keep_list(), *rows]) == list(range(N))
    assert np.array_equal(np.flatnonzero(report.weights() == 0), np.sort(rows))
    assert np.array_equal(report.drop_list(query="self"), report.unlike_batch_mates(query="self"))
    assert np.array_equal(example_report().drop_list(), example_report().unlike_batch_mates())


def test_rows_are_ranked_by_margins_else_by_the_mean_loss() -> None:
    margins = np.full((5, WINDOWS), np.nan)
    margins[:3, 0], margins[:3, 1], margins[:2, 2] = 9.0, [1.0, -2.0, 0.5], [1.0, 4.0]
    margins[3, 0] = -3.0  # visited once
    report = report_of(margins)
    expected = [-np.tanh(0.5), (np.tanh(1.0) - np.tanh(2.0)) / 2, -np.tanh(0.25), np.tanh(1.5), np.nan]
    np.testing.assert_allclose(suspicion(report.scores), expected)
    assert report.suspect_labels().tolist() == [3, 1, 2, 0] and report.suspect_labels(1).tolist() == [3]
    assert np.array_equal(suspicion(example_report().scores), example_report().scores.mean_loss, equal_nan=True)


def test_the_page_and_the_summary_say_it() -> None:
    margins, _ = margins_of(2, 0.1)
    report = report_of(margins)
    facts = report.summary()
    assert facts["label_errors"]["listed"] == len(report.label_errors()) and facts["label_errors"]["q"] == 0.1
    first = answers(report, facts)[0]
    assert first.short == f"{facts['label_errors']['listed']:,} labels" and first.tone == "suspect"
    assert any("On clean data this test lists" in line for line in first.lines)
    assert r"label\_errors" in report.to_markdown() and "unlike_batch_mates" in str(report).replace("\n", " ")
    clean = report_of(np.abs(margins_of(2, 0.0)[0]))
    assert answers(clean, clean.summary())[0].lines[0].startswith("No label is listed")


def test_margins_are_saved_and_former_reports_have_none(tmp_path: Path) -> None:
    margins, _ = margins_of(3, 0.1)
    report = report_of(margins)
    again = InfluenceReport.load(report.save(tmp_path))
    assert np.array_equal(again.scores.margins, margins, equal_nan=True)  # type: ignore[arg-type]
    assert InfluenceReport.load(example_report().save(tmp_path)).scores.margins is None  # the file is gone too
    assert InfluenceReport.load(Path(__file__).parents[1] / "fixtures" / "report").label_errors().note
    with pytest.raises(ValueError, match=r"scores.margins has shape \(4000, 7\)"):
        report_of(margins[:, 1:])


def test_runs_are_combined_by_their_mean_margins() -> None:
    margins, bad = margins_of(4, 0.1)
    noise = 0.1 * np.random.default_rng(0).standard_normal(margins.shape)
    other = replace(example_report(N + 1, 1, ()).scores.first(N), margins=margins + 2 * noise)
    both = InfluenceReport.combine([report_of(margins), InfluenceReport(other)])
    np.testing.assert_allclose(both.scores.margins, margins + noise)  # type: ignore[arg-type]
    assert np.array_equal(both.label_errors().rows, report_of(margins + noise).label_errors().rows)
    assert bad[both.label_errors().rows].mean() > 0.75


def test_isotonic_regression_is_scipys() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        values, weights = random.standard_normal(50), random.integers(1, 5, 50).astype(np.float64)
        np.testing.assert_allclose(increasing(values, weights), isotonic_regression(values, weights=weights).x)


def test_scores_without_margins_are_cut_as_before() -> None:
    scores: Scores = example_report().scores
    assert scores.first(5).margins is None and len(scores.first(5).mu) == 5
