"""Two reports beside each other: sets and ranks against counting by hand and torchmetrics."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from ine_callback.report import InfluenceReport, RunInfo, example_report
from ine_callback.report.table import as_text
from ine_callback.scores import QueryInfo, Scores

NAN = float("nan")


def made(mu: list[float], q: list[float], name: str = "val", kind: str = "loss", **config: object) -> InfluenceReport:
    """One query; rows without a score were never observed."""
    column, seen = np.array(mu)[:, None], np.isfinite(mu)
    blank = np.where(seen, 0.1, NAN)[:, None]
    scores = Scores(
        queries=(QueryInfo(name, kind, "?"),),  # type: ignore[arg-type]
        mu=column,
        q=np.array(q)[:, None],
        observations=seen.astype(int),
        mean_loss=blank[:, 0],
        null_mu=np.zeros((1, 2)),
        null_ks_p=np.array([0.5]),
        **dict.fromkeys(("se", "p", "t", "p_t", "null_sd"), blank),
    )
    return InfluenceReport(scores, RunInfo(config=config))


def test_findings_are_sorted_into_repeated_opposed_and_single() -> None:
    #             repeated  opposed  only one  unseen there  only other  none
    one = made([2.0, -1.0, 1.0, -3.0, 4.0, 0.1, 0.2], [0.01, 0.05, 0.01, 0.01, 0.01, 0.9, 0.9])
    two = made([1.0, -2.0, -1.0, -0.1, NAN, 0.3, 0.1], [0.05, 0.01, 0.01, 0.9, NAN, 0.01, 0.9])
    found = one.compare(two)["val"]
    assert (found.flagged, found.either, found.scored) == ((5, 4), 6, 6)
    assert (found.repeated, found.opposed) == ((0, 1), (2,))
    assert found.jaccard == 3 / 6
    assert found.sign_agreement == pytest.approx(5 / 6)
    assert not found.nothing_repeats
    strict = one.compare(two, q=0.01)["val"]
    assert (strict.flagged, strict.repeated, strict.opposed, strict.nothing_repeats) == ((4, 3), (), (2,), True)


def test_nothing_repeats_needs_findings() -> None:
    quiet = made([1.0, -1.0], [0.9, 0.9])
    found = quiet.compare(made([1.0, 1.0], [0.9, 0.9]))["val"]
    assert math.isnan(found.jaccard) and not found.nothing_repeats
    assert found.either == 0


def test_ends_are_shares_of_the_rows_that_both_scored() -> None:
    one, two = np.arange(100.0), np.arange(100.0)
    two[[99, 90]] = two[[90, 99]]  # the largest of all changes places within the top 10 %
    two[[0, 50]] = two[[50, 0]]
    pad = [NAN] * 100  # rows never observed must not widen the shares
    found = made([*one, *pad], [1.0] * 100 + pad).compare(made([*two, *pad], [1.0] * 100 + pad))["val"]
    assert found.top == (0.0, 4 / 6, 1.0)
    assert found.bottom == (0.0, 4 / 6, 9 / 11)
    assert found.scored == 100


def test_rank_correlation_is_spearmans_with_ties() -> None:
    random = np.random.default_rng(0)
    one, two = random.integers(0, 9, 80).astype(float), random.integers(0, 9, 80).astype(float)
    found = made([*one, 1.0, NAN], [1.0] * 81 + [NAN]).compare(made([*two, NAN, 1.0], [1.0] * 80 + [NAN, 1.0]))["val"]
    assert found.rank_correlation == pytest.approx(float(spearman_corrcoef(torch.tensor(one), torch.tensor(two))))
    assert math.isnan(made([1.0, 1.0], [1.0, 1.0]).compare(made([1.0, 2.0], [1.0, 1.0]))["val"].rank_correlation)


def test_a_report_agrees_with_itself() -> None:
    found = example_report().compare(example_report())
    assert found.identical and "equal to the last bit" in found.notes[-1]
    for each in found.agreements:
        assert each.top == each.bottom == (1.0, 1.0, 1.0) and each.sign_agreement == 1.0
        assert each.jaccard == 1.0 and each.rank_correlation == pytest.approx(1.0)
    other = example_report().compare(example_report(seed=1))
    assert not other.identical and other.notes == ()


def test_reports_without_a_common_ground_are_refused() -> None:
    one = made([1.0], [1.0])
    with pytest.raises(ValueError, match=r"compare: report 0 has 1 rows, report 1 2; give runs of the same training"):
        one.compare(made([1.0, 2.0], [1.0, 1.0]))
    for other in (made([1.0], [1.0], "test"), made([1.0], [1.0], "val", "margin")):
        with pytest.raises(ValueError, match=r"compare: the reports have no query in common: 'val' and '(test|val)'"):
            one.compare(other)
    with pytest.raises(ValueError, match=r"compare: q is 5"):
        one.compare(one, q=5)
    with pytest.raises(KeyError, match="no query 'own'; choose one of 'val'"):
        one.compare(one)["own"]


def test_notes_name_what_only_one_report_has_and_other_settings() -> None:
    report = example_report()
    scores = report.scores
    self_only = replace(
        scores,
        queries=scores.queries[:1],
        null_mu=scores.null_mu[:1],
        null_ks_p=scores.null_ks_p[:1],
        **{name: getattr(scores, name)[:, :1] for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd")},
    )
    run = replace(report.run, config=report.run.config | {"refresh": 20})
    notes = report.compare(InfluenceReport(self_only, run)).notes
    assert notes[0] == "Only the first report has 'val', 'val margin'."
    assert "(refresh)" in notes[1]


def test_views_are_complete_and_harmless() -> None:
    hostile = "<b>\x1b[31m[red]x"
    found = made([1.0, 2.0], [0.01, 0.9], hostile).compare(made([1.0, NAN], [0.01, NAN], hostile))
    text, page = str(found), found._repr_html_()
    assert "Repeated, <b>·[31m[red]x: row 0" in text and "1 and 1" in text and "1 of 1" in text
    against = str(made([1.0, 2.0], [0.01, 0.9], hostile).compare(made([-1.0, 2.0], [0.01, 0.9], hostile)))
    assert "Opposed, <b>·[31m[red]x: row 0" in against and "0 of 1" in against
    narrow = as_text(example_report().compare(example_report(seed=1)), 80)
    assert "…" not in narrow and narrow.count("8 and 8") == 1  # no word is cut
    assert "\x1b" not in text + page and "<b>" not in page and "&lt;b&gt;" in page
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["agreements"][0]["repeated"] == [0] and data["agreements"][0]["rank_correlation"] is None
