"""Scores by methods on trained models, exported, compared, combined, and shown by the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtr

from ine_callback import InfluenceReport
from ine_callback.cli import main
from ine_callback.report import example_report
from ine_callback.report.attribution_combine import END_FRACTION, combine_attributions
from ine_callback.scores import Attribution, Check, example_attribution
from tests.helpers.attributions import OTHER, VAL, whole
from tests.helpers.report import pages


def test_columns_for_other_programs() -> None:
    found = whole()
    report = example_report(12).with_attributions(replace(found, at=1, scores=found.scores * 0), found)
    report = report.with_attributions(Attribution("mu", [3], (VAL,), [[5.0]]), Attribution("q", [3], (VAL,), [[6.0]]))  # type: ignore[arg-type]
    report = report.with_attributions(Attribution("far", [3, 99], (VAL,), [[7.0], [8.0]]))  # type: ignore[arg-type]
    frame, table = report.to_pandas(), report.to_arrow()
    names = ["my_method", "my_method_se", "my_method_q", "mu_2", "q_2", "far"]
    assert [name for name in frame.columns if name not in example_report(12).to_pandas().columns] == names
    np.testing.assert_array_equal(frame["mu"], example_report(12).to_pandas()["mu"])  # f-INE's stays f-INE's
    val = frame[frame["query"] == "val"].set_index("row")
    for row, scores, se, q in zip(found.rows, found.ranking, found.ranking_se, found.q, strict=True):  # type: ignore[arg-type]
        if row < 12:
            assert (val.loc[row, ["my_method", "my_method_se", "my_method_q"]] == [scores[0], se[0], q[0]]).all()
    assert frame["my_method"].notna().sum() == 3 and frame["my_method_q"].notna().sum() == 3  # val alone is common
    assert (val.loc[3, ["mu_2", "q_2", "far"]] == [5.0, 6.0, 7.0]).all() and frame["far"].notna().sum() == 1
    for name in names:
        column = np.array([np.nan if each is None else each for each in table[name].to_pylist()])
        np.testing.assert_array_equal(column, frame[name])
    assert table["my_method"].null_count == 33


def agreement_by_hand(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    ranks = [np.argsort(np.argsort(each)) for each in (one, other)]
    k = max(1, round(END_FRACTION * len(one)))
    ends = []
    for sign in (-1, 1):
        a, b = (set(np.argsort(sign * each)[:k].tolist()) for each in (one, other))
        ends.append(len(a & b) / len(a | b))
    return (float(np.corrcoef(*ranks)[0, 1]), *ends)


def test_two_reports_are_compared_over_the_rows_that_both_scored() -> None:
    g = np.random.default_rng(1)
    scores = g.standard_normal((50, 1))
    other = scores + g.standard_normal((50, 1))
    other[4] = np.nan
    one = Attribution("m", np.arange(50), (VAL,), scores, checks=(Check("a", 1.0, "x", False, "y"),))
    two = Attribution("m", np.arange(50)[::-1] + 10, (OTHER, VAL), np.concatenate([other * 0, other], 1)[::-1])
    here, there = example_report(60, seed=1), example_report(60, seed=2)
    found = here.with_attributions(one, replace(one, method="alone"), replace(one, at=2))
    (agreed,) = found.compare(there.with_attributions(two)).methods
    keep = np.array([row for row in range(10, 50) if row != 14])
    expected = agreement_by_hand(scores[keep, 0], other[keep - 10, 0])
    assert (agreed.method, agreed.at, agreed.query, agreed.scored, agreed.passed) == (
        "m",
        "end",
        "val",
        39,
        (False, True),
    )
    assert (agreed.rank_correlation, agreed.top, agreed.bottom) == pytest.approx(expected)
    text = str(found.compare(there.with_attributions(two)))
    assert "m, end of training" in text and "no and yes" in text
    assert here.compare(there).methods == () and "Other methods" not in str(here.compare(there))


def test_runs_are_combined_by_their_scatter() -> None:
    """One row alone has no others to learn a variance from: the plain t test."""
    values, extra = np.array([1.0, 2.0, 6.0]), np.array([3.0, 4.0, 8.0])
    runs = [
        [
            Attribution(
                "m", [4, 9], (VAL,), [[v], [0.0]], [[0.1], [0.1]], columns={"c": [[e], [1.0]], "c_se": [[1], [1]]}
            )
        ]  # type: ignore[arg-type, list-item]
        for v, e in zip(values, extra, strict=True)
    ]
    (found,), notes = combine_attributions(runs)
    se = values.std(ddof=1) / np.sqrt(3)
    assert found.scores[0, 0] == pytest.approx(3.0) and found.se is not None and found.se[0, 0] == pytest.approx(se)
    assert found.p is not None and found.p[0, 0] == pytest.approx(2 * stdtr(2, -3.0 / se))
    assert found.c[0, 0] == pytest.approx(5.0) and found.c_se[0, 0] == pytest.approx(extra.std(ddof=1) / np.sqrt(3))
    assert found.scores[1, 0] == 0 and found.se[1, 0] == 0 and np.isnan(found.p[1, 0])  # no scatter, no test
    assert not notes and found.headline == "mean of 3 runs · 2 rows" and "mean of 3 runs" in found.legend


def test_p_values_of_combined_null_scores_are_uniform() -> None:
    """Two runs of nothing but noise, with rows of unlike variance: a normal p-value would flag a third of them."""
    g = np.random.default_rng(0)
    spread = np.exp(0.3 * g.standard_normal(4000))[:, None]
    runs = [[Attribution("m", np.arange(4000), (VAL,), spread * g.standard_normal((4000, 1)))] for _ in range(2)]
    (found,), _ = combine_attributions(runs)
    assert found.p is not None and found.q is not None
    assert [float((found.p < level).mean()) for level in (0.05, 0.01)] == pytest.approx([0.05, 0.01], abs=0.012)
    assert (found.q < 0.05).sum() == 0


def test_what_not_all_runs_have_is_left_out_and_named() -> None:
    a, b = example_report(12, seed=1), example_report(12, seed=2)
    base = whole(columns={"c": np.ones((3, 2))}, ranked_by="c", checks=(Check("ok", 1.0, "x", True, "y"),))
    far = replace(base, method="far", rows=[0, 1, 3])
    one = a.with_attributions(base, far, replace(base, method="alone"))
    failed = Check("ok", 9.0, "x", False, "y")
    two = b.with_attributions(
        replace(base, rows=[9, 7, 5], checks=(failed,), columns={}, ranked_by="", notes=("two", "three")),
        replace(far, rows=[8, 9, 10]),
    )
    both = InfluenceReport.combine([one, two])
    (found,) = both.attributions
    assert found.method == "my method" and found.rows.tolist() == [7, 9] and found.at == 3
    first, second = base.scores[0], base.scores[1]  # row 7 in the two runs, on "val" NaN in the second
    np.testing.assert_allclose(found.scores[0], [first[0], (first[1] + second[1]) / 2])
    assert found.checks == (failed,) and not found.reliable and found.ranked_by == "" and found.columns == {}
    assert found.layers is None and found.tokens is None and found.arrays == {}
    assert found.notes == ("one", "two", "three")
    told = [note for note in both.run.notes if "left out of the combined report" in note]
    assert told == [
        "far, after epoch 3, is left out of the combined report: no row and query is in all runs.",
        "alone, after epoch 3, is left out of the combined report: 1 of 2 runs have it.",
    ]


def test_rows_without_a_score_are_in_no_list() -> None:
    found = replace(example_attribution(), scores=[[np.nan], [2.0], [-1.0], [np.nan], [1.0]])  # type: ignore[arg-type]
    assert found.top(9).tolist() == [1, 4, 2] and found.bottom(9, "val").tolist() == [2, 4, 1]
    with pytest.raises(KeyError, match="no query 'x'; choose one of 'val'"):
        found.top(1, "x")


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(pages.report_of(60).with_attributions(pages.other(60)).save(tmp_path / "report"))


def test_a_methods_scores_are_shown_by_the_command_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", folder, "--method", "other", "--query", "margin", "--top", "3"]) == 0
    text = capsys.readouterr().out
    found = pages.other(60)
    assert "Another method (other)" in text and "UNRELIABLE" in text and "A note." in text
    assert "f-INE" not in text and str(found.top(1)[0]) in text
    assert main(["show", folder, "--method", "BIF"]) == 0
    assert "After epoch 2" in capsys.readouterr().out
    assert main(["show", folder, "--method", "other", "--json", "--top", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    lists = {"margin": {"top": found.top(2).tolist(), "bottom": found.bottom(2).tolist()}}
    assert told == {"method": "other", "at": "end", "reliable": False, "queries": lists}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "none"], "no method 'none' ran on the trained model; there are: BIF, other"),
        (["--method", "other", "--query", "self"], "no query 'self'; choose one of 'margin'"),
        (["--method", "other", "--flagged"], "--flagged and --bottom list f-INE's scores"),
        (["--method", "other", "--bottom", "3"], "--flagged and --bottom list f-INE's scores"),
    ],
)
def test_what_the_command_line_cannot_show_is_told(
    folder: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", folder, *words]) not in (0, 1)
    assert told in capsys.readouterr().err
