"""Outcomes that a training gives its rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ine_callback.effects import ATE, NDE, NIE, EffectData, Outcome, estimate
from ine_callback.errors import InfluenceError
from ine_callback.report import example_report

X = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    )


def first(module: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return module(batch[0])[:, 0]


def test_predictions_are_those_of_evaluation_mode_in_the_rows_order() -> None:
    module = network().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.get_rng_state()
    found = Outcome.prediction(module, DataLoader(TensorDataset(X), batch_size=32), first)
    assert module.training and all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.allclose(found.values, module.eval()(X)[:, 0].detach().numpy(), atol=1e-6)


def test_a_model_that_looks_at_the_group_has_an_effect_of_it() -> None:
    """The prediction's direct effect of a group is its weight, whatever else differs between groups."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, 2000)
    skill = rng.normal(size=2000) + group
    model = torch.nn.Linear(2, 1)
    model.weight.data, model.bias.data = torch.tensor([[0.3, 1.0]]), torch.zeros(1)
    x = torch.tensor(np.c_[group, skill], dtype=torch.float32)
    outcome = Outcome.prediction(model, DataLoader(TensorDataset(x), batch_size=500), first)
    data = EffectData(
        {"group": group, "skill": skill}, "group", outcome, "group -> skill -> prediction; group -> prediction"
    )
    assert abs(estimate(data, NDE(), "linear").estimate - 0.3) < 1e-3
    indirect = estimate(data, NIE(), "linear")
    assert abs(indirect.estimate - 1) < 4 * indirect.standard_error


def test_reports_have_losses_and_scores_by_dataset_index() -> None:
    report = example_report()
    assert (Outcome.loss(report).values == report.scores.mean_loss).sum() == 59  # one row was never observed
    names = [query.name for query in report.scores.queries]
    found = Outcome.score(report, "val").values
    assert np.array_equal(found, report.scores.mu[:, names.index("val")], equal_nan=True)
    assert np.array_equal(Outcome.score(report).values, report.scores.mu[:, 0], equal_nan=True)


def test_what_is_no_outcome_is_refused() -> None:
    report = example_report()
    with pytest.raises(
        InfluenceError, match=r"Outcome.score: no query 'test' in the report, which has \['self', 'val'"
    ):
        Outcome.score(report, "test")
    with pytest.raises(InfluenceError, match="the loader shuffles"):
        Outcome.prediction(network(), DataLoader(TensorDataset(X), shuffle=True), first)
    with pytest.raises(InfluenceError, match=r"value gives the shape \(400, 1\)"):
        Outcome.prediction(network(), DataLoader(TensorDataset(X), batch_size=400), lambda m, batch: m(batch[0]))
    group = np.arange(60) % 2
    with pytest.raises(InfluenceError, match="column 'loss' has no finite number in row"):  # never observed
        EffectData({"group": group}, "group", Outcome.loss(report), "group -> loss")
    with pytest.raises(InfluenceError, match="the outcome 'loss' is a column, too"):
        EffectData({"group": group, "loss": group}, "group", Outcome.loss(report), "group -> loss")


def test_an_outcome_of_another_length_is_refused() -> None:
    with pytest.raises(InfluenceError, match="unequal lengths"):
        EffectData({"group": np.arange(50) % 2}, "group", Outcome("loss", np.zeros(60)), "group -> loss")
    assert estimate(
        EffectData({"group": np.arange(600) % 2}, "group", Outcome("loss", np.arange(600) % 2 * 1.0), "group -> loss"),
        ATE(),
    ).estimate == pytest.approx(1)
