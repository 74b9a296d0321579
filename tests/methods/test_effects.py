"""Effects in a fit: the training as it is, the free function's numbers, from YAML, and what is refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from jsonargparse import ArgumentParser
from pyarrow import csv

from ine_callback import FINE, CausalEffects, InfluenceReport
from ine_callback.effects import ATE, NDE, WCDE, EffectData, Networks, Outcome, estimate
from ine_callback.errors import InfluenceError
from ine_callback.methods import FitEndMethod
from tests.helpers.effect_runs import GRAPH, effect_methods, source_effect, sourced, sourced_fit, sourced_rows


def assert_untouched(model: Any, alone: Any) -> None:
    """The same training, to the last bit."""
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def margin(module: Any, batch: Any) -> torch.Tensor:
    logits = module.net(batch[0])
    return torch.as_tensor(logits[:, 1] - logits[:, 0])


def from_batch(batch: Any) -> dict[str, torch.Tensor]:
    return {"size": batch[0][:, 0], "web": batch[0][:, 1]}


def test_a_fit_estimates_the_effect_on_its_losses(tmp_path: Path) -> None:
    alone, *_ = sourced_fit([FINE()])
    model, influence, _ = sourced_fit(effect_methods(), dirpath=tmp_path)
    assert_untouched(model, alone)
    report = influence.report
    data = EffectData(sourced(), "web", Outcome.loss(report), GRAPH)
    expected = estimate(data, ATE(), folds=2, refuse=False)
    found = report.effects["ATE of web on loss"]
    assert found.to_dict() == expected.to_dict() and np.array_equal(found.influence, expected.influence)
    assert InfluenceReport.load(tmp_path).effects["ATE of web on loss"].to_dict() == expected.to_dict()


def test_scores_and_predictions_are_outcomes_at_any_stage() -> None:
    graph = GRAPH.replace("loss", "score")
    _, influence, _ = sourced_fit(
        effect_methods(outcome="score", graph=graph, estimands=[ATE(), ATE(adjust=["size"])][:1]),
    )
    report = influence.report
    by_hand = estimate(EffectData(sourced(), "web", Outcome.score(report), graph), ATE(), folds=2, refuse=False)
    assert report.effects.found[0].to_dict() == by_hand.to_dict()
    graph = GRAPH.replace("loss", "prediction")
    method = source_effect(outcome=margin, graph=graph, columns=from_batch, at=[1, "end"])
    model, influence, _ = sourced_fit([FINE(), method])
    assert [each.at for each in influence.report.stages("effects")] == [1, "end"]
    values = Outcome("prediction", margin(model.eval(), sourced_rows()).detach().double().numpy())
    by_hand = estimate(EffectData(sourced(), "web", values, graph), ATE(), folds=2, refuse=False)
    assert influence.report.effects.found[0].estimate == pytest.approx(by_hand.estimate, abs=1e-4)


def test_networks_are_trained_inside_of_the_fit_without_a_trace() -> None:
    alone, *_ = sourced_fit([FINE()])
    asked = {"outcome": margin, "graph": GRAPH.replace("loss", "prediction"), "at": [1, "end"]}
    model, influence, trainer = sourced_fit(effect_methods(nuisances=Networks(epochs=3), **asked))
    assert_untouched(model, alone)
    assert influence.report.effects.found[0].nuisances == "networks" and trainer.current_epoch == 2
    assert trainer.state.finished and model.trainer is trainer


def test_paths_and_files_of_columns(tmp_path: Path) -> None:
    columns = sourced() | {"contrast": sourced()["web"] + np.random.default_rng(2).normal(size=240)}
    csv.write_csv(pa.table({name: np.asarray(each, dtype=float) for name, each in columns.items()}), "rows.csv")
    tiers = [["size"], ["web"], ["contrast"], ["loss"]]
    _, influence, _ = sourced_fit(
        effect_methods(columns="rows.csv", graph=None, tiers=tiers, tau=0.01, estimands=[NDE()]),
    )
    effects = influence.report.effects
    assert effects.names[0] == "NDE of web on loss through {contrast}" and effects.edges["web", "contrast"] > 0.9


def test_rows_without_a_loss_are_left_out_and_counted() -> None:
    _, influence, _ = sourced_fit(effect_methods(), limit_train_batches=7, max_epochs=1)
    found = influence.report.attribution("effects")
    assert len(found.rows) == 224 and "16 rows without a loss are left out" in " ".join(found.notes)
    assert not set(influence.report.unseen) & set(found.rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"graph": "web -> loss -> web; size -> web"}, "the graph has the cycle"),
        ({"graph": "web -> loss; size -> loss; shape -> web"}, "the graph has 'shape', and the columns are"),
        ({"graph": "web -> size"}, "'loss' is no node of the graph"),
        ({"estimands": [WCDE()]}, "WCDE: no mediator between"),
        ({"estimands": [ATE(adjust=[])]}, r"ATE: \{\} is not valid, \{size\} is"),
        ({"estimands": []}, "no estimands and no tau"),
        ({"tau": 0.1}, "looks for paths under tiers"),
        ({"outcome": "margin"}, "outcome='margin'; choose 'loss' or 'score'"),
        ({"at": [1, "end"]}, "the run's loss is known at its end"),
        ({"query": "val"}, "query='val' belongs to outcome='score'"),
        ({"columns": "nowhere.csv"}, "columns='nowhere.csv' is no file"),
        ({"nuisances": "forest"}, "nuisances='forest'; choose"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_asked_is_refused_before_training(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        source_effect(**changed)


def test_faults_of_the_run_are_named_in_the_report() -> None:
    short = {name: each[:100] for name, each in sourced().items()}
    for changed, message in (
        ({"columns": short}, r"columns have \[100\] rows, and the training set has 240"),
        ({"outcome": "score", "graph": GRAPH.replace("loss", "score"), "query": "own"}, "no query 'own' in this run"),
    ):
        with pytest.raises(InfluenceError, match=message):
            sourced_fit(effect_methods(**changed))
    _, influence, _ = sourced_fit(effect_methods(columns=short), raises=False)
    assert any("effects failed: InfluenceError: CausalEffects: columns have" in n for n in influence.report.run.notes)


def test_it_is_made_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--methods", type=list[FitEndMethod])
    made = parser.parse_string(
        f"""
        methods:
          - class_path: ine_callback.CausalEffects
            init_args:
              treatment: web
              columns: {{size: {sourced()["size"].round(3).tolist()}, web: {sourced()["web"].astype(int).tolist()}}}
              graph: "{GRAPH}"
              estimands:
                - class_path: ine_callback.effects.ATE
                  init_args: {{adjust: [size]}}
              nuisances: linear
              folds: 2
        """
    )
    (method,) = parser.instantiate(made).methods
    assert isinstance(method, CausalEffects) and method.estimands[0] == ATE(adjust=["size"])
    _, influence, _ = sourced_fit([FINE(), method])
    assert influence.report.effects.found[0].adjustment == (("size",),)
