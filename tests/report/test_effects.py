"""Effects in a report: kept to the last bit, shown everywhere, refused wherever rows help or harm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ine_callback import InfluenceReport
from ine_callback.cli import main
from ine_callback.effects import Effect, paths
from ine_callback.effects.reported import Effects, attribution
from ine_callback.errors import InfluenceError
from ine_callback.report import example_report
from ine_callback.report.effects_plot import drawings
from ine_callback.scores import Attribution, QueryInfo
from tests.helpers.attributions import assert_same
from tests.helpers.effect_runs import report_with_effects

NAME, THROUGH = "ATE of web on loss", "NIE of web on loss through {contrast}"
PATH = "web → contrast → loss"


@pytest.fixture(scope="module")
def report() -> InfluenceReport:
    return report_with_effects()


def test_a_saved_report_holds_the_same_effects(report: InfluenceReport, tmp_path: Path) -> None:
    again = InfluenceReport.load(report.save(tmp_path))
    assert_same(again.attribution("effects"), report.attribution("effects"))
    before, after = report.effects, again.effects
    assert after.names == before.names and {NAME, THROUGH, PATH} <= set(after.names)
    for one, other in zip(before.found, after.found, strict=True):
        assert one.to_dict() == other.to_dict() and np.array_equal(one.influence, other.influence)
        assert one.interval() == other.interval() and one.p == other.p and one.adjustment == other.adjustment
    for one, other in zip(before.paths, after.paths, strict=True):
        assert one.to_dict() == other.to_dict() and one.averaged == other.averaged
    assert after.edges == before.edges and str(after) == str(before) and repr(after) == repr(before)


def test_columns_are_influence_and_what_leaving_the_row_out_adds(report: InfluenceReport) -> None:
    found, effect = report.attribution("effects"), report.effects[NAME]
    assert found is not None and isinstance(effect, Effect)
    assert (found.scores[:, 0] == effect.influence).all() and {query.kind for query in found.queries} == {"estimand"}
    assert (found.removal[:, 0] == -effect.influence / (len(effect.influence) - 1)).all()
    assert effect.estimate == pytest.approx(0.3 - 0.48, abs=0.3)
    most = found.rows[np.argsort(-effect.influence)[:10]]
    assert (found.top(10, NAME) == most).all()
    frame = report.to_pandas().query("query == 'val'")
    assert np.array_equal(frame[f"effects/{NAME}"].to_numpy()[:599], effect.influence)
    assert np.isnan(frame[f"effects/{NAME}"].to_numpy()[599])  # left out by rows=


def test_a_report_without_effects_says_how_to_get_some() -> None:
    with pytest.raises(InfluenceError, match=r"no effects here; train with methods=\[FINE\(\), CausalEffects"):
        _ = example_report().effects


def test_terminal_markdown_and_page_show_them(report: InfluenceReport, tmp_path: Path) -> None:
    text, marked = str(report), report.to_markdown()
    page = report.write_html(tmp_path / "page.html").read_text(encoding="utf-8")
    for shown in (text, marked, page):
        for part in ("Causal effects", "web on loss", "the graph is right", "stability", "carried most by rows"):
            assert part in shown, part
    assert "Raise the estimate most" in text and "Raise the estimate most" in page
    for section in (text.split("Causal effects")[1], page.split("<h2>Causal effects")[1].split("</section>")[0]):
        assert "helpful" not in section and "harmful" not in section
    assert page.count('<img src="data:image/png;base64,iVBOR') == 1
    assert 'alt="Causal graph: ' in page and "size to web" in page


def test_the_graph_is_drawn_with_the_stability_of_its_edges(report: InfluenceReport) -> None:
    tiers, given = drawings(report.effects)[:2]
    axes = report.plot.effects()
    texts = [each.get_text() for each in axes.texts]
    uncertain = [f"{chance:.2f}" for chance in tiers.edges.values() if chance < 1]
    assert {"size", "web", "contrast", "loss"} <= set(texts) and set(uncertain) <= set(texts)
    assert any("web → contrast → loss: stability 1.00" in text for text in texts)
    assert tiers.edges["web", "contrast"] > 0.99 and tiers.edges.get(("web", "noise"), 0) < 0.5
    assert given.edges["web", "loss"] == 1 and given.adjusted == {"size"} and given.treatment == "web"


@pytest.mark.parametrize(
    "asked",
    [
        "drop_list", "keep_list", "weights", "unlike_batch_mates", "top", "bottom", "flagged", "info",
        "to_dataset_column",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [NAME, PATH])
def test_what_asks_for_helpful_or_harmful_rows_refuses_estimands(
    report: InfluenceReport, asked: str, name: str
) -> None:
    with pytest.raises(ValueError, match="is an estimand: its rows raise or lower an estimate, and neither help nor"):
        getattr(report, asked)(query=name)


def test_groups_exports_and_the_command_line_refuse_them_too(
    report: InfluenceReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="is an estimand"):
        report.group([1, 2], query=NAME)
    with pytest.raises(ValueError, match="is an estimand"):
        report.export(tmp_path / "drop.csv", "drop-list", query=NAME)
    report.save(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", "drop-list", "--query", NAME]) == 2
    assert "is an estimand" in capsys.readouterr().err
    with pytest.raises(InfluenceError, match="'effects' has scored tokens"):
        report.token_mask("effects")


def test_no_method_of_training_steps_may_ask_an_estimand() -> None:
    scores = example_report().scores
    queries = (QueryInfo("x", "estimand", "?"), *scores.queries[1:])
    with pytest.raises(ValueError, match="scores ask 'x', an estimand, for which no row helps or harms"):
        InfluenceReport(replace(scores, queries=queries))


def test_two_reports_effects_are_compared_on_the_same_rows(report: InfluenceReport) -> None:
    other = report_with_effects(seed=3)
    notes = report.compare(other).notes
    line = next(note for note in notes if note.startswith(NAME))
    one, two = report.effects[NAME], other.effects[NAME]
    assert isinstance(one, Effect) and isinstance(two, Effect)
    error = np.sqrt(((one.influence - two.influence) ** 2).sum()) / 599
    assert f"{one.estimate:+.3f}".replace("-", "−") in line and f"± {error:.2g}, on the same rows" in line
    assert error < 0.9 * np.hypot(one.standard_error, two.standard_error)  # the rows are shared


def test_combined_reports_leave_them_out_and_say_what_to_do(report: InfluenceReport) -> None:
    combined = InfluenceReport.combine([report, report_with_effects(seed=3)])
    assert combined.attribution("effects") is None
    assert any("effects, end of training, are left out" in note and "anew" in note for note in combined.run.notes)


def test_positivity_that_fails_is_a_failed_check(report: InfluenceReport) -> None:
    found = report.effects.found[0]
    bad = replace(found, positivity=replace(found.positivity, imbalance={"web = 1": 0.7}))
    made = report.with_effects(bad, rows=np.arange(599))
    assert made.attribution("effects").reasons[0].startswith(f"{NAME}: imbalance is 0.7")  # type: ignore[union-attr]
    assert "UNRELIABLE: do not use what fails its check" in str(made) and "imbalance is 0.7" in made.to_markdown()


def test_what_does_not_belong_together_is_refused(report: InfluenceReport) -> None:
    one, other = report.effects.found
    for given, message in (
        ((one, one), "'ATE of web on loss' is there twice"),
        ((one, replace(other, influence=other.influence[:-1])), r"effects have \[598, 599\] rows"),
        ((), "got nothing; give Effects"),
        (("a",), "got str; give Effects"),
    ):
        with pytest.raises(InfluenceError, match=message):
            report.with_effects(*given)  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="are of 599 rows, and the report has 600; name the dataset index"):
        report.with_effects(one)
    with pytest.raises(InfluenceError, match="rows names 2 rows, and the effects have 599"):
        report.with_effects(one, rows=[1, 2])


@pytest.mark.parametrize(
    "damage",
    [
        {"effects": None}, {"paths": [{}]}, {"edges": [["a"]]}, {"tau": "x"}, {"effects": []},
        {"effects": [{"estimand": 1}]},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_effects_are_shown_as_plain_scores_and_named(report: InfluenceReport, damage: dict[str, Any]) -> None:
    found = report.attribution("effects")
    assert isinstance(found, Attribution)
    broken = InfluenceReport(report.scores, report.run, [replace(found, settings={**found.settings, **damage})])
    with pytest.raises(InfluenceError, match=r"the effects in this report are damaged .*; estimate them anew"):
        _ = broken.effects
    assert "Causal effects" in str(broken) and broken.to_markdown()  # and no view fails


def test_the_command_shows_a_reports_effects(
    report: InfluenceReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.save(tmp_path / "run")
    assert main(["effects", "show", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(report.effects).strip()
    assert main(["effects", "show", str(tmp_path / "run"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["effects"][0]["estimate"] == report.effects.found[0].estimate and shown["paths"]
    assert main(["show", str(tmp_path / "run"), "--method", "effects", "--query", NAME, "--top", "3"]) == 0
    assert "Raise the estimate most" in capsys.readouterr().out
    example_report().save(tmp_path / "none")
    assert main(["effects", "show", str(tmp_path / "none")]) == 2
    assert "no effects here" in capsys.readouterr().err


def test_paths_alone_are_effects_too(report: InfluenceReport) -> None:
    effects = Effects(attribution([paths(_tiered(report))]))
    assert effects.found == () and effects.paths and not effects.flow and "effects along paths" in str(effects)


def _tiered(report: InfluenceReport) -> Any:
    from ine_callback.effects import EffectData

    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 300)
    return EffectData({"A": a, "Y": a + rng.normal(size=300)}, "A", "Y", tiers=[["A"], ["Y"]])
