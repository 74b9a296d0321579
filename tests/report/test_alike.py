"""Rows that act alike as findings: near duplicates and weak groups, found where they are and not where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ine_callback.errors import InfluenceError
from ine_callback.report import InfluenceReport, alike, example_report
from ine_callback.report.neighbours import LEADING, duplicate_cosine, near_duplicates, nearest
from ine_callback.report.weak_groups import grouped, weak_groups
from ine_callback.scores import Scores
from tests.helpers.report.pages import ALIKE, TWINS, report_of, store_of, stored

MANY = 400


@pytest.fixture(scope="module")
def report() -> InfluenceReport:
    return stored(report_of())


def scores_like(mu: np.ndarray, sd: float = 1.0) -> Scores:
    """Scores of one query whose rows are not flagged."""
    fits = example_report(MANY).scores
    each = {name: np.full((MANY, 1), sd) for name in ("se", "p", "q", "t", "p_t", "null_sd")}
    return replace(fits, queries=fits.queries[1:2], mu=mu[:, None], observations=np.full(MANY, 3), **each)


def test_a_weak_group_is_found_whose_rows_are_not_flagged_alone(report: InfluenceReport) -> None:
    first, *others = report.weak_groups()
    assert first.query == "margin" and not others
    assert len(set(first.rows) & set(ALIKE)) >= 0.75 * max(len(ALIKE), len(first.rows))
    assert (report.scores.q[first.rows, 1] > 0.05).all() and first.mu > 0 and first.q <= 0.05
    assert first.mu == pytest.approx(report.group(first.rows, "margin").mu) and first.t > 4
    assert f"{len(first.rows)} rows lower 'margin' together" in str(first)
    assert report.weak_groups(query="class/cat") == []


def test_where_no_rows_belong_together_none_are_found() -> None:
    found = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        store, mu = store_of(random.standard_normal((MANY, 30))), random.standard_t(3, MANY)  # heavy tails
        found += bool(weak_groups(store, scores_like(mu, 0.2), [0], 0.05))
    assert found <= 6  # 2 expected; more than 6 in 1 of 250


def test_the_score_itself_makes_no_group() -> None:
    """A score is a product with the vectors: grouped by them as they are, rows would agree on it without a reason."""
    found = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        z = random.standard_normal((MANY, 6))
        store, mu = store_of(z), z @ random.standard_normal(6)
        assert _between(grouped(store, np.arange(MANY), np.zeros((MANY, 1))), mu) > 0.35
        assert _between(grouped(store, np.arange(MANY), mu[:, None]), mu) < 0.1
        found += bool(weak_groups(store, scores_like(mu, 0.2), [0], 0.05))
    assert found <= 4


def _between(groups: np.ndarray, mu: np.ndarray) -> float:
    """Fraction of the variance of mu that lies between groups."""
    means = np.bincount(groups, mu) / np.maximum(np.bincount(groups), 1)
    return float(means[groups].var() / mu.var())


@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_near_duplicates_are_nearer_than_rows_are_in_this_run(noise: float) -> None:
    random = np.random.default_rng(0)
    common = 1 / noise * random.standard_normal(80)  # the smaller the noise, the more alike are all rows
    numbers = random.standard_normal((MANY, 80)) + 0.1 * common
    twins = numbers[:10] + 0.2 * random.standard_normal((10, 80))
    store = store_of(np.concatenate([numbers, twins]))
    found = near_duplicates(store, duplicate_cosine(store))
    assert [group.tolist() for group in found] == [[k, MANY + k] for k in range(10)]


def test_pairs_are_ruled_out_by_few_numbers_and_none_is_lost() -> None:
    random = np.random.default_rng(3)
    numbers = random.standard_normal((MANY, LEADING + 20)) * np.linspace(3, 0.3, LEADING + 20)
    numbers[300:] = numbers[:100] + random.uniform(0, 1.5, (100, 1)) * random.standard_normal((100, LEADING + 20))
    store, unit = store_of(numbers), store_of(numbers).unit_rows().astype(np.float64)
    for cosine in (0.5, 0.9):
        close = unit @ unit.T >= cosine
        reach = np.linalg.matrix_power(close.astype(float), 16) > 0
        expected = {tuple(np.flatnonzero(line)) for line in reach if line.sum() > 1}
        assert {tuple(group) for group in near_duplicates(store, cosine)} == expected


def test_the_nearest_of_many_rows_are_those_of_each() -> None:
    store = store_of(np.random.default_rng(4).standard_normal((5000, 8)))
    which = np.array([4999, 3, 2048])
    rows, cosines = nearest(store, which, 7)
    all_cosines = store.unit_rows(which) @ store.unit_rows().T
    for k, row in enumerate(which):
        all_cosines[k, row] = -2
        assert rows[k].tolist() == np.argsort(-all_cosines[k], kind="stable")[:7].tolist()
        np.testing.assert_allclose(cosines[k], np.sort(all_cosines[k])[::-1][:7], atol=1e-6)


def test_findings_are_in_all_views(report: InfluenceReport, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = report.summary()["alike"]
    assert facts["near_duplicates"] == [list(pair) for pair in TWINS] and facts["weak_groups"][0]["query"] == "margin"
    for text in (" ".join(str(report).replace("│", " ").split()), report.to_markdown().replace("\\", "")):
        assert "report.near_duplicates() lists 6 rows in 3 groups" in " ".join(text.split()).replace(
            "_duplicates", "_duplicates"
        )
        assert "report.weak_groups() lists 1 group" in text and "rows lower 'margin'" in text
    assert "6 rows in 3 groups" in report._repr_html_()
    bare = report_of()
    assert bare.summary()["alike"] is None and "uplicate" not in str(bare) + bare.to_markdown() + bare._repr_html_()
    monkeypatch.setattr(alike, "MOST_ROWS", 100)
    assert "not looked for in more than 100 rows" in stored(report_of()).to_markdown().replace("\\", "")


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(InfluenceError, match="weak_groups: the report has no gradient store"):
        example_report().weak_groups()
    with pytest.raises(KeyError, match="no query"):
        stored(report_of()).weak_groups(query="other")
    assert stored(report_of(240, chains=False)).weak_groups(q=1e-9) == []
