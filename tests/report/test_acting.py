"""What to do about a report: labels proposed and how sure they are, weights for the next training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ine_callback import InfluenceReport
from ine_callback.applications.relabel import _fit, _joint
from ine_callback.report import example_report
from ine_callback.scores import QueryInfo

NOISE, SHARPNESS, CLASSES = 0.2, 2.0, 4


@pytest.fixture(scope="module")
def simulated() -> tuple[InfluenceReport, np.ndarray, np.ndarray, np.ndarray]:
    """A report of 4,000 rows, given and true labels, and probabilities that are less sure than they could be."""
    random = np.random.default_rng(0)
    logits = 2.0 * random.standard_normal((4000, CLASSES))
    sharp = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = (random.random((4000, 1)) > sharp.cumsum(1)).sum(1)
    wrong = random.random(4000) < NOISE
    given = np.where(wrong, (true + random.integers(1, CLASSES, 4000)) % CLASSES, true)
    flat = np.exp(logits / SHARPNESS)
    return example_report(4000), given, true, flat / flat.sum(1, keepdims=True)


def test_noise_and_temperature_are_those_of_the_data(simulated: tuple) -> None:
    _, given, _, probabilities = simulated
    noise, temperature = _fit(np.log(probabilities), given)
    assert noise == pytest.approx(NOISE, abs=0.03) and temperature == pytest.approx(1 / SHARPNESS, rel=0.1)


def test_confidences_are_honest(simulated: tuple) -> None:
    report, given, true, probabilities = simulated
    rows = np.flatnonzero(probabilities[np.arange(4000), given] < 0.3)  # a biased choice of rows, as a report's is
    found = report.suggest_labels(given, probabilities, rows)
    right = found.proposed == true[found.rows]
    assert 0.3 < right.mean() < 0.7
    for part in (slice(None), found.confidence > 0.7, found.confidence < 0.3):
        error = math.sqrt(right[part].mean() * (1 - right[part].mean()) / right[part].size)
        assert abs(found.confidence[part].mean() - right[part].mean()) < 3 * error + 0.01
    # taken at face value the probabilities are no confidences
    assert abs(probabilities[found.rows, found.proposed].mean() - right.mean()) > 0.05
    errors = (given != true).mean()
    assert (found.corrected(given) != true).mean() < errors - 0.03


def test_the_posterior_is_bayes_rule() -> None:
    p, given, noise, temperature = [0.5, 0.3, 0.2], 1, 0.1, 0.5
    joint = [p[c] ** 2 / 0.38 * (0.9 if c == given else 0.05) for c in range(3)]
    found = np.exp(_joint(np.log([p]), np.array([given]), noise, temperature))[0]
    np.testing.assert_allclose(found, joint, rtol=1e-12)


def test_the_surest_come_first_and_the_given_label_is_never_proposed(simulated: tuple) -> None:
    report, given, _, probabilities = simulated
    found = report.suggest_labels(given, probabilities)
    assert sorted(found.rows) == sorted(report.drop_list()) and (np.diff(found.confidence) <= 0).all()
    assert (found.proposed != found.given).all() and (found.given == given[found.rows]).all()
    assert list(found.to_pandas().columns) == ["row", "given", "proposed", "confidence"]
    assert f"{found.rows[0]}" in str(found) and "noise found: 2" in str(found)


def test_a_model_that_has_learnt_the_labels_proposes_nothing(simulated: tuple) -> None:
    report, given, _, _ = simulated
    learnt = np.full((4000, CLASSES), 0.02 / (CLASSES - 1))
    learnt[np.arange(4000), given] = 0.98
    found = report.suggest_labels(given, learnt)
    assert (found.corrected(given) == given).all() and found.noise < 0.03


def test_influence_proposes_the_class_that_the_row_harms_most() -> None:
    report = example_report(8, planted=())
    names = ["self", "val/0", "val/1", "val/10"]
    mu = np.zeros((8, 4))
    mu[3], mu[5] = [9.0, 0.2, -0.1, -0.5], [9.0, -0.4, 0.3, -0.9]
    wide = {n: np.repeat(getattr(report.scores, n)[:, :1], 4, 1) for n in ("se", "p", "q", "t", "p_t", "null_sd")}
    queries = tuple(QueryInfo(name, "self" if name == "self" else "loss", "?") for name in names)
    mu[7] = np.nan
    null = {"null_mu": np.zeros((4, 2)), "null_ks_p": np.ones(4)}
    report = InfluenceReport(replace(report.scores, queries=queries, mu=mu, **wide, **null))
    found = report.suggest_labels([0, 0, 0, 1, 0, 10, 0, 0], rows=[3, 5, 7])
    assert found.rows.tolist() == [3, 5]  # row 7 has no scores, and so no proposal
    assert found.proposed.tolist() == [10, 0] and np.isnan(found.confidence).all() and np.isnan(found.noise)
    assert (found.corrected(np.zeros(8, int)) == 0).all()  # nobody is sure of anything
    assert "–" in str(found)


def test_what_does_not_fit_is_refused() -> None:
    report, labels, halves = example_report(), np.arange(60) % 2, np.full((60, 2), 0.5)
    for arguments, message in (
        ((labels[:9], halves), r"labels of shape \(9,\)"),
        ((labels / 2, halves), "float64"),
        ((labels, halves[:3]), "those of all rows"),
        ((labels + 1, halves), "labels to 2"),
        ((labels, 3 * halves), "not logits"),
        ((labels, halves * np.nan), "not logits"),
        ((labels,), "one query for each class"),
    ):
        with pytest.raises(ValueError, match=message):
            report.suggest_labels(*arguments)
    with pytest.raises(KeyError, match="no row 60"):
        report.suggest_labels(labels, halves, rows=[60])


def test_weights_leave_the_list_out_or_follow_the_scores() -> None:
    report = example_report()
    assert np.flatnonzero(report.weights() == 0).tolist() == [3, 17, 29] and set(report.weights()) == {0.0, 1.0}
    assert report.weights(q=0.0).sum() == 60 - (report.scores.q[:, 0] <= 0).sum()
    for query, sign in (("self", -1), ("val", 1)):
        mu = sign * report.scores.mu[:, report.column(query)]
        soft = report.weights(query=query, strength=0.3)
        assert soft[59] == 1.0 and soft.min() >= 0 and soft.max() <= 2  # row 59 was never observed
        inside = (soft > 0) & (soft < 2) & np.isfinite(mu)
        expected = 1 + 0.3 * mu / math.sqrt(np.nanmean(mu**2))
        np.testing.assert_allclose(soft[inside], expected[inside])
        assert inside.sum() > 40
    with pytest.raises(ValueError, match="strength is -1"):
        report.weights(strength=-1)
