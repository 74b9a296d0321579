"""What a report answers: order and sign of rows, missing rows, groups, words."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from ine_callback.report import InfluenceReport, RunInfo, example_report
from ine_callback.scores import QueryInfo, Scores

MU = np.array([[0.5, 2.0], [-1.0, -3.0], [0.1, 0.0], [np.nan, np.nan], [-0.2, 1.0], [0.5, np.nan]])
Q = np.array([[0.01, 0.001], [0.03, 0.04], [0.9, 1.0], [np.nan, np.nan], [0.05, 0.2], [0.2, np.nan]])


def tiny(kinds: tuple[str, str] = ("loss", "self"), **changes: object) -> Scores:
    """Six rows, two queries; row 3 was never observed, row 5 has no score on the second query."""
    scores = Scores(
        queries=(QueryInfo("val", kinds[0], "?"), QueryInfo("own", kinds[1], "?")),  # type: ignore[arg-type]
        mu=MU,
        se=np.where(np.isnan(MU), np.nan, 0.1),
        p=Q / 2,
        q=Q,
        t=MU * 3,
        p_t=Q,
        null_sd=np.where(np.isnan(MU), np.nan, 0.25),
        observations=np.array([4, 3, 2, 0, 1, 5]),
        mean_loss=np.array([0.1, 2.0, 0.3, np.nan, 0.5, 0.2]),
        null_mu=np.zeros((2, 4)),
        null_ks_p=np.array([0.5, np.nan]),
    )
    return replace(scores, **changes)  # type: ignore[arg-type]


@pytest.fixture
def report() -> InfluenceReport:
    return InfluenceReport(tiny())


def test_top_is_most_helpful_first_and_skips_rows_without_score(report: InfluenceReport) -> None:
    assert report.top(10).rows.tolist() == [0, 5, 2, 4, 1]  # a tie (0, 5) in order of row id
    assert report.top(2).rows.tolist() == [0, 5]
    assert report.top(10, "own").rows.tolist() == [0, 4, 2, 1]


def test_bottom_is_most_harmful_first(report: InfluenceReport) -> None:
    assert report.bottom(2).rows.tolist() == [1, 4]
    assert report.bottom(10, "own").rows.tolist() == [1, 2, 4, 0]


def test_flagged_includes_the_threshold_and_sorts_by_magnitude(report: InfluenceReport) -> None:
    assert report.flagged(0.05).rows.tolist() == [1, 0, 4]
    assert report.flagged(0.04, "own").rows.tolist() == [1, 0]
    assert len(report.flagged(0.0)) == 0
    assert report.flagged(1.0).rows.tolist() == [1, 0, 5, 4, 2]


def test_drop_list_takes_the_suspect_end() -> None:
    loss_and_self = InfluenceReport(tiny())
    assert loss_and_self.recommended_query == "own"
    assert loss_and_self.drop_list().tolist() == [0]  # self: the upper end; row 1 (-3, flagged) is typical
    assert loss_and_self.drop_list(query="val").tolist() == [1, 4]  # loss: mu < 0, worst first
    assert loss_and_self.drop_list(0.25).tolist() == [0, 4]
    loss_and_margin = InfluenceReport(tiny(("loss", "margin")))
    assert loss_and_margin.recommended_query == "own"
    assert loss_and_margin.drop_list().tolist() == [1]
    assert InfluenceReport(tiny(("margin", "self"))).recommended_query == "own"
    assert InfluenceReport(tiny(("loss", "custom"))).recommended_query == "val"


def test_labels_are_suspected_by_the_mean_loss() -> None:
    report = InfluenceReport(tiny(mean_loss=np.array([0.1, 2.0, 2.0, np.nan, 9.0, 0.2])))
    assert report.suspect_labels().tolist() == [4, 1, 2, 5, 0]  # a tie in order of row id, no row without a loss
    assert report.suspect_labels(2).tolist() == [4, 1]
    with pytest.raises(ValueError, match="suspect_labels: the run knew no losses"):
        InfluenceReport(tiny(mean_loss=np.full(6, np.nan))).suspect_labels()


def test_a_row_carries_all_its_numbers(report: InfluenceReport) -> None:
    one = report.bottom(1)[0]
    assert (one.row, one.query, one.mu, one.se, one.q, one.p, one.t, one.p_t) == (
        1, "val", -1.0, 0.1, 0.03, 0.015, -3.0, 0.03,
    )  # fmt: skip
    assert (one.low, one.high) == pytest.approx((-1.196, -0.804))
    assert (one.observations, one.mean_loss) == (3, 2.0)
    assert isinstance(one.row, int) and isinstance(one.mu, float) and isinstance(one.query, str)


def test_never_observed_rows_are_listed_and_never_zero(report: InfluenceReport) -> None:
    assert report.unseen.tolist() == [3]
    table = report.row(3)
    assert [one.query for one in table] == ["val", "own"]
    assert all(math.isnan(one.mu) and math.isnan(one.q) and one.observations == 0 for one in table)
    assert "never observed" in str(table) and "0.0" not in str(table)
    assert all("never" in line and "0×" not in line for line in table.cells().body)
    frame = report.to_pandas()
    assert len(frame) == 12 and frame[frame.row == 3].mu.isna().all()


def test_row_shows_every_query(report: InfluenceReport) -> None:
    assert [(one.query, one.mu) for one in report.row(1)] == [("val", -1.0), ("own", -3.0)]


def test_tables_are_immutable_sequences(report: InfluenceReport) -> None:
    table = report.top(4)
    assert table[1:3].rows.tolist() == [5, 2] and table[-1].row == 4
    assert [one.row for one in reversed(table)] == [4, 2, 5, 0]
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0] = 9
    with pytest.raises(ValueError, match="read-only"):
        report.scores.mu[0, 0] = 9
    assert table.to_pandas().row.tolist() == [0, 5, 2, 4]


def test_long_table_is_query_major(report: InfluenceReport) -> None:
    frame = report.to_pandas()
    assert frame["query"].tolist() == ["val"] * 6 + ["own"] * 6
    np.testing.assert_array_equal(frame.mu.to_numpy(), MU.T.ravel())
    np.testing.assert_array_equal(frame.mean_loss.to_numpy()[:6], report.scores.mean_loss)


def test_groups_add_up(report: InfluenceReport) -> None:
    group = report.group([0, 1, 4])
    assert group.mu == pytest.approx(-0.7) and group.size == 3
    assert group.null_sd == pytest.approx(0.25 * math.sqrt(3))
    assert group.z == pytest.approx(group.mu / group.null_sd)
    assert group.p == pytest.approx(2 * norm.sf(abs(group.z)))
    halves = report.group(np.array([0, 1])).mu + report.group({4}).mu
    assert group.mu == pytest.approx(halves)


def test_trade_off_of_a_group() -> None:
    group = example_report().group([3, 17, 29], "val margin")
    alpha, beta = group.curve(11)
    assert alpha[0] == 0 and alpha[-1] == 1 and beta[0] == 1 and beta[-1] == 0
    assert np.all(np.diff(beta) < 0) and np.all(beta <= 1 - alpha + 1e-12)
    inner = slice(1, -1)  # mu = Phi^-1(1 - alpha) - Phi^-1(beta), whatever the test
    np.testing.assert_allclose(norm.isf(alpha[inner]) - norm.ppf(beta[inner]), abs(group.mu))
    assert float(group.errors(0.05)) == pytest.approx(norm.cdf(norm.isf(0.05) - abs(group.mu)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        group.errors(1.5)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "no rows given"),
        ([1, 1], ValueError, "row 1 given more than once"),
        ([6], KeyError, "no row 6; the report has rows 0 to 5"),
        ([-1], KeyError, "no row -1"),
        ([3, 0], ValueError, "row 3 never observed"),
        ([0.0], ValueError, "flat list of dataset indices"),
        ([[0, 1]], ValueError, "flat list"),
        (np.ones(6, bool), ValueError, "flatnonzero"),
    ],
)
def test_group_errors_name_value_and_remedy(
    report: InfluenceReport, rows: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"InfluenceReport.group: .*{message}"):
        report.group(rows)  # type: ignore[arg-type]


def test_group_refuses_rows_without_score_on_the_query(report: InfluenceReport) -> None:
    with pytest.raises(ValueError, match="row 5 never observed or without a score"):
        report.group([5], "own")


def test_unknown_query_and_bad_arguments(report: InfluenceReport) -> None:
    with pytest.raises(KeyError, match="no query 'x'; choose one of 'val', 'own'"):
        report.top(query="x")
    with pytest.raises(ValueError, match="k is 0"):
        report.bottom(0)
    with pytest.raises(ValueError, match="q is 2"):
        report.flagged(2)
    with pytest.raises(KeyError, match="no row 99"):
        report.row(99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"se": np.zeros((6, 1))}, r"scores.se has shape \(6, 1\)"),
        ({"queries": (QueryInfo("a", "loss", ""), QueryInfo("a", "loss", ""))}, "its own name"),
        ({"observations": np.array([4, 3, 2, 0, 0, 5])}, "never observed rows have scores .4."),
        ({"null_mu": np.zeros((3, 4))}, "null_mu"),
        ({"mean_loss": np.zeros(5)}, "mean_loss"),
    ],
)
def test_inconsistent_scores_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceReport(tiny(**changes))


def test_summary_is_json_and_counts_flags(report: InfluenceReport) -> None:
    facts = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert (facts["rows"], facts["seen"], facts["unseen"]) == (6, 5, 1)
    val, own = facts["queries"]
    assert (val["helpful"], val["harmful"], val["suspects"], val["scored"]) == (1, 2, 2, 5)
    assert (own["helpful"], own["harmful"], own["suspects"], own["scored"]) == (1, 1, 1, 4)
    assert val["null_ks_p"] == 0.5 and own["null_ks_p"] is None
    assert facts["null_checks_failed"] == []


@pytest.mark.parametrize("p", [0.009, 0.0])
def test_a_failed_null_check_is_loud(p: float) -> None:
    report = InfluenceReport(tiny(null_ks_p=np.array([0.5, p])))
    assert report.summary()["null_checks_failed"] == ["own"]
    assert "NULL CHECK FAILED for 'own'" in str(report)
    assert "NULL CHECK FAILED" in report._repr_html_()
    assert "NULL CHECK" not in str(InfluenceReport(tiny()))


def test_terminal_view_shows_question_scores_losses_and_notes() -> None:
    text = str(example_report())
    for part in (
        "Which rows lower the mean loss",
        "never observed",
        "Synthetic example",
        "98.4 %",
        "mean loss",
        "helpful",
    ):
        assert part in text
    assert "\x1b" not in text
    assert repr(InfluenceReport(tiny())) == "InfluenceReport(6 rows, queries: 'val', 'own'; 1 row never observed)"


def test_self_influence_is_never_called_harmful() -> None:
    report = InfluenceReport(tiny(("self", "self")))
    assert "harmful" not in str(report.bottom(2)) + str(report.top(2))
    assert "atypical" in str(report)


def test_foreign_text_cannot_drive_the_terminal() -> None:
    query = QueryInfo("[red]val\x1b[2J", "loss", "why\x1b]0;title\x07?\n[/]")
    report = InfluenceReport(
        tiny(queries=(query, QueryInfo("own", "self", "?"))),
        RunInfo(notes=["\x1b[31mred"], uncaptured={"\x1b": "[/b]"}),
    )
    shown = [str(report), repr(report), str(report.top()), repr(report.top()), str(report.row(0)), report._repr_html_()]
    assert not any("\x1b" in text or "\x07" in text for text in shown)
    assert "[red]val" in shown[0]


def test_long_tables_say_what_they_hide() -> None:
    table = example_report(200).top(50)
    assert "and 30 more" in str(table) and "and 30 more" in table._repr_html_()


def test_signals_that_are_not_finite_take_a_few_lines_however_many_queries() -> None:
    text = str(InfluenceReport(tiny(), RunInfo(nonfinite={f"row/{k}": 690 for k in range(50)} | {"none": 0})))
    assert "690 non-finite signals of 'row/2'" in text and "'row/3'" not in text and "'none'" not in text
    assert "… and non-finite signals of 47 more queries (report.run.nonfinite)." in text


def test_run_info_is_plain_json() -> None:
    run = RunInfo(config={"lr": np.float32(0.5), "x": (1, math.inf)}, seconds=3, schedule={"a": math.nan})
    assert run.config == {"lr": 0.5, "x": [1, "inf"]} and run.seconds == 3.0 and run.schedule == {"a": None}
    assert RunInfo.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False))) == run
    with pytest.raises(ValueError, match=r"config\['f'\] is a function, which JSON cannot hold"):
        RunInfo(config={"f": lambda: 0})
    with pytest.raises(ValueError, match=r"captured_share is 1\.5"):
        RunInfo(captured_share=1.5)
    with pytest.raises(ValueError, match="steps must be int"):
        RunInfo(steps="many")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown fields"):
        RunInfo.from_dict({"host": "x"})


def test_report_without_any_observation_still_renders() -> None:
    empty = np.full((6, 2), np.nan)
    nothing = dict.fromkeys(("mu", "se", "p", "q", "t", "p_t", "null_sd"), empty)
    report = InfluenceReport(
        tiny(**nothing, observations=np.zeros(6, int), mean_loss=empty[:, 0], null_mu=np.zeros((2, 0)))  # type: ignore[arg-type]
    )
    assert len(report.top()) == 0 and report.unseen.size == 6 and report.drop_list().size == 0
    assert "6 rows were never observed" in str(report)
    report.figure()
