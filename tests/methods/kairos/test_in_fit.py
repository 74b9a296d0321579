"""KAIROS in a fit: the features that it takes, the values of a fit, training that stays as it is, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import FINE, InfluenceCallback, InfluenceReport
from ine_callback.errors import InfluenceError
from ine_callback.methods import KAIROS
from ine_callback.methods.kairos.values import kairos
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import ROWS, Model, data, loaders
from tests.helpers.contexts import CLASSES, LABELS, VECTORS, bound, choices, entropy, numbers
from tests.helpers.fit_end import Dots, assert_untouched, fit


def flat(x: Tensor) -> Any:
    return x.detach().double().flatten(1).numpy()


def hidden(model: Model, x: Tensor) -> Any:
    """What the last layer gets, in evaluation mode."""
    model.eval()
    found = flat(model.net[:-1](x))
    model.train()
    return found


def test_values_in_a_fit_are_those_of_its_features(alone: tuple[Model, Any], tmp_path: Path) -> None:
    model, influence, _ = fit([FINE(), KAIROS(at=[1, "end"]), Dots()], raises=True, dirpath=tmp_path)
    assert_untouched(model, alone)
    report = influence.report
    assert_same(report.scores, alone[1].scores)
    found = report.attribution("KAIROS")
    x, y = data()
    free = kairos(hidden(model, x[:ROWS]), y[:ROWS], hidden(model, x[ROWS:]), y[ROWS:])
    assert found.scores[:, 0] == pytest.approx(free.values, abs=1e-5)  # features are float32
    assert found.columns["conformal_p"][:, 0] == pytest.approx(free.conformal_p(), abs=2 / 13)
    assert found.settings["features"] == "penultimate" and found.queries[0].name == "val"
    assert any("'net.4'" in note for note in found.notes)
    first = report.stages("KAIROS")[0]
    assert first.at == 1 and np.abs(first.scores - found.scores).max() > 1e-4
    loaded = InfluenceReport.load(tmp_path)
    assert_same(loaded.attribution("KAIROS"), found)
    assert "Data values" in str(loaded)
    assert any("KAIROS" in str(name) or "kairos" in str(name) for name in loaded.to_pandas().columns)


def test_inputs_and_functions_are_features_too() -> None:
    x, y = data()
    asked: list[Any] = ["input", lambda module, batch: batch[0] * 2, "net.3"]
    values = []
    for features in asked:
        model, influence, _ = fit([KAIROS(features=features, reference=(x[ROWS:], y[ROWS:]))], raises=True)
        found = influence.report.attribution("KAIROS")
        values.append(found.scores[:, 0])
        assert found.queries[0].name == "reference"
    free = kairos(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:])
    double = kairos(2 * x[:ROWS], y[:ROWS], 2 * x[ROWS:], y[ROWS:])
    assert np.abs(values[0] - free.values).max() < 1e-12
    assert np.abs(values[1] - double.values).max() < 1e-12
    # what the dropout gets is what the last layer gets, for in evaluation mode it does nothing
    assert values[2] == pytest.approx(kairos(*four(model, x, y)).values, abs=1e-5)


def four(model: Model, x: Tensor, y: Tensor) -> tuple[Any, Any, Any, Any]:
    return hidden(model, x[:ROWS]), y[:ROWS], hidden(model, x[ROWS:]), y[ROWS:]


def test_it_needs_no_query_and_no_labels() -> None:
    _, influence, _ = fit([KAIROS(lam=1)], raises=True, queries="self")
    found = influence.report.attribution("KAIROS")
    assert set(found.columns) == {"features", "conformal_p"} and len(found.rows) == ROWS


class Regression(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1])

    validation_step = training_step


def trained(module: Model, method: KAIROS, *loaders: Any, queries: Any = "val") -> Any:
    influence = InfluenceCallback(queries, [method], on_error="raise")
    quiet: Any = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=1, callbacks=[influence], enable_model_summary=False, **quiet)
    trainer.fit(module, *loaders)
    return influence.report.attribution("KAIROS")


def regression(method: KAIROS) -> Any:
    x, y = data()
    sets = [TensorDataset(x[part], y[part].float() + 0.5) for part in (slice(ROWS), slice(ROWS, None))]
    return trained(Regression(), method, *(DataLoader(each, batch_size=16) for each in sets))


def test_a_regression_has_features_alone() -> None:
    with pytest.raises(InfluenceError, match=r"have no labels.*lam=1"):
        regression(KAIROS())
    assert len(regression(KAIROS(lam=1)).rows) == ROWS


def test_what_cannot_be_a_reference_is_refused_before_training() -> None:
    with pytest.raises(InfluenceError, match=r"reference=\[3, 4\] are rows of the training set"):
        KAIROS(reference=[3, 4])
    with pytest.raises(InfluenceError, match="features=3 names none"):
        KAIROS(features=3)  # type: ignore[arg-type]
    model = Model()
    train, _ = loaders()
    with pytest.raises(InfluenceError, match="'val' needs a validation loader and there is none"):
        trained(model, KAIROS(), train, queries="self")
    assert not model.seen


def test_a_reference_out_of_the_training_rows_is_refused() -> None:
    x, y = data()
    with pytest.raises(InfluenceError, match="training rows 4, 5 are in the reference too"):
        fit([KAIROS(reference=(x[[4, 5, 96, 97]], y[[4, 5, 96, 97]]))], raises=True)


def test_a_method_that_fails_is_named_and_costs_nothing(alone: tuple[Model, Any]) -> None:
    x, y = data()
    with pytest.warns(UserWarning, match="KAIROS failed"):
        model, influence, _ = fit([FINE(), KAIROS(reference=(x[90:], y[90:]))])
    assert_untouched(model, alone)
    assert not influence.report.attributions


class Tokens(nn.Module):
    """An embedding, a recurrent layer that is called once, and a head in the middle of the list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, CLASSES, dtype=torch.float64)
        self.embedding = nn.Embedding(9, 6, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(ids).mean(1))
        return out


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x))
        return out


REFERENCE = (numbers(40, 4), choices(CLASSES, 40))


def test_the_last_layer_is_the_last_that_is_called() -> None:
    module, ids = Tokens(), choices(9, len(LABELS), 5)
    other = choices(9, 41, 5)
    context = bound(module, entropy, (ids, LABELS))
    found = KAIROS(reference=(other, choices(CLASSES, 41))).run
    with pytest.raises(InfluenceError, match="are in the reference too"):  # few ids: some rows are the same
        found(bound(module, entropy, (torch.cat([ids[:-1], other[:1]]), LABELS)))
    made = found(context)
    assert "'head'" in made.notes[0]
    features = [module.embedding(each).mean(1).detach() for each in (ids, other)]
    free = kairos(features[0], LABELS, features[1], choices(CLASSES, 41))
    assert np.abs(made.scores[:, 0] - free.values).max() < 1e-12


@pytest.mark.parametrize(
    ("module", "method", "message"),
    [
        (Twice(), KAIROS(reference=REFERENCE), "'layer' was called 2 times"),
        (Twice(), KAIROS(reference=REFERENCE, features="nothing"), "'nothing' is no layer.*'layer'"),
        (
            nn.Linear(4, CLASSES, dtype=torch.float64),
            KAIROS(reference=REFERENCE),
            'features="penultimate", but no layer',
        ),
        (
            Twice(),
            KAIROS(reference=REFERENCE, features=lambda module, batch: batch[0].sum(0, keepdim=True)),
            "for a batch of 40 rows",
        ),
        (Twice(), KAIROS(reference=REFERENCE, features=lambda module, batch: batch[1]), "torch.int64"),
    ],
)
def test_features_that_cannot_be_are_refused(module: nn.Module, method: KAIROS, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        method.run(bound(module, entropy, (VECTORS, LABELS)))


def test_ids_are_no_features() -> None:
    ids = choices(9, len(LABELS), 5)
    method = KAIROS(reference=(choices(9, 41, 5), choices(CLASSES, 41)), features="input")
    with pytest.raises(InfluenceError, match=r'features="input".*torch.int64'):
        method.run(bound(Tokens(), entropy, (ids, LABELS)))


@pytest.mark.parametrize(
    "loss",
    [
        entropy,  # read from the graph
        lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1),  # from the batch
    ],
)
def test_labels_come_from_the_loss_or_the_batch(loss: Callable[..., Tensor]) -> None:
    module = nn.Sequential(nn.Linear(4, CLASSES, dtype=torch.float64))
    made = KAIROS(reference=REFERENCE, features="input").run(bound(module, loss, (VECTORS, LABELS)))
    free = kairos(VECTORS, LABELS, *REFERENCE)
    assert np.abs(made.scores[:, 0] - free.values).max() < 1e-12


def test_labels_of_the_loss_come_before_others_of_the_batch() -> None:
    module = nn.Sequential(nn.Linear(4, CLASSES, dtype=torch.float64))
    ids = torch.arange(len(LABELS))
    method = KAIROS(reference=(*REFERENCE, torch.arange(40)), features="input")
    made = method.run(bound(module, entropy, (VECTORS, LABELS, ids)))
    assert np.abs(made.scores[:, 0] - kairos(VECTORS, LABELS, *REFERENCE).values).max() < 1e-12


def test_it_is_built_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--method", type=KAIROS)
    text = "{class_path: ine_callback.methods.KAIROS, init_args: {sigma: 3.0, lam: 1, features: input, at: [2, end]}}"
    built = parser.instantiate_classes(parser.parse_args(["--method", text])).method
    assert built == KAIROS(sigma=3.0, lam=1, features="input", at=[2, "end"])
