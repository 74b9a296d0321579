"""Several runs measure the spread in whose units their mean is: by hand, its invariances, notes, files, trainings."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ine_callback import FINE, Recorder
from ine_callback.report import InfluenceReport, ReportError, RunInfo, example_report
from ine_callback.report.answers import answers
from ine_callback.report.combine import combine_scores
from ine_callback.scores import Scores
from ine_callback.stats.measured_spread import measured_spread
from ine_callback.utilities.words import SIZE

SCALED = ("mu", "se", "null_sd")
LOSSES = ((np.nan, 0.3, 2.0), (np.nan, 0.5, 1.0), (np.nan, 0.4, 4.0), (np.nan, 0.9, 1.0), (np.nan, 0.5, 2.0))
UNITS = ((np.nan, 0.1, 1.0), (np.nan, 0.2, 2.0), (np.nan, 0.1, 0.5), (np.nan, 0.4, 1.0), (np.nan, 0.2, 1.0))


@cache
def single(seed: int) -> Scores:
    return example_report(seed=seed).scores


def run(seed: int, unit: Any = None, loss: Any = None) -> Scores:
    """The example's scores (self, val, val margin) with these units and losses."""
    known = {"unit": UNITS[seed] if unit is None else unit, "query_loss": LOSSES[seed] if loss is None else loss}
    return replace(single(seed), **{name: np.array(each, dtype=np.float64) for name, each in known.items()})


def test_mu_is_the_mean_shift_over_the_measured_spread() -> None:
    runs = [run(seed) for seed in range(5)]
    found, plain = combine_scores(runs), combine_scores([single(seed) for seed in range(5)])
    losses, units = np.array(LOSSES)[:, 1:], np.array(UNITS)[:, 1:]
    sd = measured_spread(losses, np.exp(np.log(units).mean(0)))
    np.testing.assert_allclose(found.unit, [np.nan, *sd])
    np.testing.assert_allclose(found.query_loss, [np.nan, 0.52, 2.0])
    shifts = np.stack([each.mu[:, 1:] * unit for each, unit in zip(runs, units, strict=True)])
    np.testing.assert_allclose(found.mu[:, 1:], shifts.mean(0) / sd)
    errors = np.stack([each.null_sd[:, 1:] * unit for each, unit in zip(runs, units, strict=True)])
    np.testing.assert_allclose(found.null_sd[:, 1:], np.sqrt(np.square(errors).sum(0)) / 5 / sd)
    np.testing.assert_allclose(found.t, found.mu / found.se)
    for name in (*SCALED, "t", "p_t"):
        np.testing.assert_array_equal(getattr(found, name)[:, 0], getattr(plain, name)[:, 0])  # self-influence
    for name in ("p", "q", "null_mu", "null_ks_p"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


def test_with_equal_units_one_number_multiplies_each_query_and_tests_stay() -> None:
    units = [np.nan, 0.3, 0.7]
    runs = [run(seed, unit=units) for seed in range(3)]
    found, plain = combine_scores(runs), combine_scores([single(seed) for seed in range(3)])
    assert found.unit is not None
    for name in SCALED:
        np.testing.assert_allclose(
            getattr(found, name)[:, 1:], getattr(plain, name)[:, 1:] * np.divide(units, found.unit)[1:]
        )
    for name in ("p", "q", "t", "p_t"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-9)


def test_two_runs_stay_near_their_prediction() -> None:
    """One degree of freedom: however close or far two losses are, the prediction counts."""
    for distance, low, high in ((0.0, 0.5, 0.6), (2**0.5, 1.0, 1.0), (6.0, 1.5, 4.3)):
        unit = combine_scores(
            [run(0, [np.nan, 1, 1], [np.nan, 0, 0]), run(1, [np.nan, 1, 1], [np.nan, distance, distance])]
        ).unit
        assert unit is not None and low <= unit[1] + 1e-12 and unit[1] <= high + 1e-12


@pytest.mark.parametrize("name", ["unit", "query_loss"])
def test_what_one_run_does_not_know_is_not_measured(name: str) -> None:
    runs = [run(seed) for seed in range(3)]
    hollow = replace(runs[1], **{name: np.array([np.nan, np.nan, 1.5])})
    found, plain = (combine_scores([runs[0], each, runs[2]]) for each in (hollow, replace(runs[1], **{name: None})))
    assert found.unit is not None and np.isnan(found.unit[1]) and found.unit[2] > 0
    assert plain.unit is None
    for array in SCALED:
        there = getattr(combine_scores([single(seed) for seed in range(3)]), array)
        np.testing.assert_array_equal(getattr(found, array)[:, 1], there[:, 1])
        np.testing.assert_array_equal(getattr(plain, array), there)


def test_units_follow_their_queries() -> None:
    runs, turned = [run(seed) for seed in range(3)], [2, 0, 1]
    arrays = {name: getattr(runs[1], name)[:, turned] for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd")}
    arrays |= {name: getattr(runs[1], name)[turned] for name in ("unit", "query_loss", "null_mu", "null_ks_p")}
    other = replace(runs[1], queries=tuple(runs[1].queries[k] for k in turned), **arrays)
    here, there = (combine_scores([runs[0], each, runs[2]]) for each in (runs[1], other))
    for name in (*SCALED, "unit", "query_loss"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))


@settings(max_examples=50, deadline=None)
@given(
    st.floats(1e-4, 1e4), st.lists(st.floats(0.125, 4), min_size=6, max_size=6), st.lists(st.floats(-3, 3), min_size=6)
)
def test_the_unit_of_a_query_does_not_matter(c: float, units: list[float], losses: list[float]) -> None:
    runs = [
        run(seed, [np.nan, units[2 * seed], units[2 * seed + 1]], [np.nan, losses[2 * seed], losses[2 * seed + 1]])
        for seed in range(3)
    ]
    scaled = [replace(each, unit=c * each.unit, query_loss=c * each.query_loss) for each in runs]  # type: ignore[operator]
    here, there = combine_scores(runs), combine_scores(scaled)
    assert here.unit is not None
    np.testing.assert_allclose(there.unit, c * here.unit, rtol=1e-6)
    for name in ("mu", "se", "null_sd", "t", "p", "q"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-6)


# ---- what the report says ----

DOUBT = f"{SIZE}the rows' order moves the queries 5.0 times as far as the initial weights (at most 4)"


def notes_of(runs: list[Scores], *notes: str) -> list[str]:
    reports = [InfluenceReport(each, RunInfo(notes=list(notes), rows=60, seed=k)) for k, each in enumerate(runs)]
    combined = InfluenceReport.combine(reports)
    card = next(answer for answer in answers(combined, combined.summary()) if answer.question == "Can I believe it?")
    assert (card.short == "The ranking, not the size") == any(note.startswith(SIZE) for note in combined.run.notes)
    return [note for note in combined.run.notes if note.startswith("size")]


def test_the_notes_say_whose_spread_was_measured_and_over_how_many_runs() -> None:
    runs = [run(seed) for seed in range(3)]
    assert notes_of(runs) == ["size: the spread of 2 queries was measured over 3 runs"]
    one = [replace(each, unit=np.array([np.nan, np.nan, 1.0])) for each in runs]
    assert notes_of(one) == ["size: the spread of 1 query was measured over 3 runs (others: predicted by single runs)"]
    none = [single(seed) for seed in range(2)]
    assert notes_of(none) == ["sizes are predicted by single runs: no query's spread was measured"]
    alone = [
        replace(
            each,
            queries=each.queries[:1],
            null_mu=each.null_mu[:1],
            null_ks_p=each.null_ks_p[:1],
            **{name: getattr(each, name)[:, :1] for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd")},
        )
        for each in none
    ]
    assert notes_of(alone) == []  # self-influence has units of its own


def test_five_runs_that_measured_all_queries_put_doubts_of_the_prediction_aside() -> None:
    runs = [run(seed) for seed in range(5)]
    assert notes_of(runs, DOUBT) == ["size: the spread of 2 queries was measured over 5 runs"]
    assert notes_of(runs[:4], DOUBT)[1:] == [DOUBT]
    partly = [replace(each, unit=np.array([np.nan, np.nan, 1.0])) for each in runs]
    assert notes_of(partly, DOUBT)[1:] == [DOUBT]


# ---- files ----


def test_units_and_losses_are_saved_and_those_of_former_reports_are_unknown(tmp_path: Path) -> None:
    report = InfluenceReport(run(0), RunInfo(rows=60))
    again = InfluenceReport.load(report.save(tmp_path)).scores
    np.testing.assert_array_equal(again.unit, UNITS[0])
    np.testing.assert_array_equal(again.query_loss, LOSSES[0])
    meta = json.loads((tmp_path / "meta.json").read_text())
    former = {name: each for name, each in meta.items() if name not in ("unit", "query_loss")}
    (tmp_path / "meta.json").write_text(json.dumps(former))
    again = InfluenceReport.load(tmp_path).scores
    assert again.unit is None and again.query_loss is None
    for fault, why in (([1.0], "unit is not a list of 3"), ([1, "x", 2], "not a number"), ([1, 2, -1], "not above 0")):
        (tmp_path / "meta.json").write_text(json.dumps(former | {"unit": fault}))
        with pytest.raises(ReportError, match=why):
            InfluenceReport.load(tmp_path)


def test_units_are_checked_and_are_no_arrays_over_rows() -> None:
    assert run(0).first(2).unit is not None and run(0).first(2).mu.shape == (2, 3)
    np.testing.assert_array_equal(run(0).first(2).unit, UNITS[0])
    with pytest.raises(ValueError, match=r"scores.query_loss has shape \(2,\), expected \(3,\)"):
        InfluenceReport(run(0, loss=[1.0, 2.0]))
    with pytest.raises(ValueError, match=r"scores\.unit is not above 0; NaN says unknown"):
        InfluenceReport(run(0, unit=[0.0, 1.0, 2.0]))
    scores = InfluenceReport(run(0, loss=[np.inf, 1.0, 2.0])).scores
    assert scores.query_loss is not None and np.isnan(scores.query_loss[0]) and not scores.query_loss.flags.writeable


# ---- trainings ----


def trained(seed: int, weights: str = "random", closing: bool = True) -> tuple[InfluenceReport, list[float]]:
    """A short training with its own weights and order, and the queries' losses after it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    data = {"a": (x[40:50], y[40:50]), "b": (x[50:], y[50:])}
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    descent = torch.optim.SGD(model.parameters(), lr=0.2)

    def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    queries: Any = data | {"self": "self"}
    method = [FINE(closing=closing)]
    recorder = Recorder(
        model, descent, 40, queries, loss, method, total_steps=20, initial_weights=weights, on_error="raise"
    )
    with recorder:
        for rows in torch.cat([torch.randperm(40) for _ in range(4)]).split(8):
            with recorder.batch(rows, (x[rows], y[rows])):
                loss(model, (x[rows], y[rows])).backward()
            descent.step()
            descent.zero_grad()
    return recorder.report(), [loss(model, batch).item() for batch in data.values()]


def test_three_trainings_measure_the_unit() -> None:
    runs = [trained(seed) for seed in (1, 2, 3)]
    reports, losses = [report for report, _ in runs], np.array([each for _, each in runs])
    for report, expected in runs:
        scores = report.scores
        assert scores.unit is not None and scores.query_loss is not None
        assert np.isnan([scores.unit[2], scores.query_loss[2]]).all() and (scores.unit[:2] > 0).all()
        np.testing.assert_allclose(scores.query_loss[:2], expected, rtol=1e-5)
    combined = InfluenceReport.combine(reports)
    units = np.stack([report.scores.unit[:2] for report in reports])  # type: ignore[index]
    assert combined.scores.unit is not None
    expected = measured_spread(losses, np.exp(np.log(units).mean(0)))
    np.testing.assert_allclose(combined.scores.unit[:2], expected, rtol=1e-5)
    cards = [answers(report, report.summary())[-1] for report in (combined, reports[0])]
    assert [card.short for card in cards] == ["Yes, by its own checks", "The ranking; sizes within a factor of 2"]
    shifts = np.mean([each.scores.mu[:, :2] * each.scores.unit[:2] for each in reports], axis=0)  # type: ignore[index]
    np.testing.assert_allclose(combined.scores.mu[:, :2] * combined.scores.unit[:2], shifts)
    assert "size: the spread of 2 queries was measured over 3 runs" in combined.run.notes


def test_fixed_weights_know_losses_alone_and_no_closing_pass_nothing() -> None:
    fixed, without = trained(1, "fixed")[0].scores, trained(1, closing=False)[0].scores
    assert fixed.unit is None and fixed.query_loss is not None and np.isfinite(fixed.query_loss[:2]).all()
    assert without.unit is None and without.query_loss is None
