"""Methods that run on a trained model, side by side: what each found is in the report, none costs another anything."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ine_callback import BIF, FINE
from ine_callback.methods import FitContext, FitEndMethod, PerSamplePass
from ine_callback.scores import Attribution
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import ROWS, SHORT_CHAINS, Model, loaders
from tests.helpers.cases import mostly_long
from tests.helpers.fit_end import EXPECTED, Dots, Norms, Plain, assert_untouched, by_method, fit


class Counting(L.Callback):
    """Forward passes of the module, when training is over; a queue, as numbers that a pass changes are put back."""

    def __init__(self) -> None:
        self.seen, self.on = Queue[None](), False

    @property
    def passes(self) -> int:
        return self.seen.qsize()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def count(*_: Any) -> None:
            if self.on:
                self.seen.put(None)

        pl_module.net.register_forward_hook(count)  # type: ignore[union-attr, operator]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on = True


@pytest.fixture(scope="module")
def together() -> tuple[Model, Any]:
    """All methods in one fit."""
    model, influence, _ = fit([FINE(), Norms([1, "end"]), Dots(), BIF(**SHORT_CHAINS), Plain()], raises=True)  # type: ignore[arg-type]
    return model, influence.report


def test_methods_are_in_the_report_with_their_settings(together: tuple[Model, Any], alone: tuple[Model, Any]) -> None:
    model, report = together
    assert_untouched(model, alone)
    assert set(by_method(report)) == EXPECTED | {("BIF", "end"), ("plain", "end")}
    assert_same(report.scores, alone[1].scores)
    assert report.attribution("gradient dot").settings == {"passes": 2, "kind": repr(Path("a path"))}
    assert report.attribution("plain").rows.tolist() == [5, 3, 4] and report.attribution("plain").notes == ("a note",)
    assert report.bif.settings["chains"] == 4 and [each.at for each in report.stages("gradient norm")] == [1, "end"]
    first, last = report.stages("gradient norm")
    assert (first.scores != last.scores).any() and (
        first.scores > 0
    ).all()  # the buffer is the method's, the scores ours


@pytest.mark.parametrize("order", mostly_long(list(itertools.permutations(range(4)))[1::6], "(3, 0, 2, 1)"))
def test_their_order_makes_no_difference(order: tuple[int, ...], together: tuple[Model, Any]) -> None:
    methods = [FINE(), Norms([1, "end"]), Dots(), BIF(**SHORT_CHAINS)]  # type: ignore[arg-type]
    _, influence, _ = fit([methods[k] for k in order], raises=True)
    found, expected = by_method(influence.report), by_method(together[1])
    assert set(found) == set(expected) - {("plain", "end")}
    for key, each in found.items():
        assert_same(each, expected[key])


def test_scores_are_those_of_the_rows_gradients(together: tuple[Model, Any]) -> None:
    """Against a pass for each row alone, of the trained weights."""
    model, report = together
    train, val = loaders()
    model.eval()
    parameters = list(model.parameters())
    xq, yq = val.dataset.tensors  # type: ignore[attr-defined]
    query = torch.autograd.grad(torch.nn.functional.cross_entropy(model.net(xq), yq), parameters)
    x, y = train.dataset.tensors  # type: ignore[attr-defined]
    for row in (0, 50, ROWS - 1):
        loss = torch.nn.functional.cross_entropy(model.net(x[row : row + 1]), y[row : row + 1])
        own = torch.autograd.grad(loss, parameters)
        norm, dot = (
            sum(float(g.square().sum()) for g in own),
            sum(float((g * q).sum()) for g, q in zip(own, query, strict=True)),
        )
        assert report.attribution("gradient norm").scores[row, 0] == pytest.approx(norm, rel=1e-4)
        assert report.attribution("gradient dot").scores[row, 0] == pytest.approx(dot, rel=1e-3, abs=1e-6)
    model.train()


def test_equal_passes_are_made_once() -> None:
    def passes(*methods: FitEndMethod) -> int:
        counting = Counting()
        fit([FINE(), *methods], raises=True, callbacks=[counting])
        return counting.passes

    batches = 2  # of 64 rows each
    named = [type(f"Norms{k}", (Norms,), {"name": f"norm {k}"})() for k in range(3)]
    one = passes(named[0])
    assert one >= batches  # and more of the first batch, which look at the order of its rows
    assert passes(*named) == one
    other = type("Some", (Norms,), {"name": "some"})(rows=range(9))
    assert passes(*named, other) == one + 1


def test_a_dataclass_without_a_hash_is_a_method() -> None:
    @dataclass
    class Settings(FitEndMethod):
        name: str = "settings"
        rows: Any = None

        def run(self, context: FitContext) -> Any:
            found: list[Tensor] = []
            yield PerSamplePass(rows=self.rows), lambda rows, gradients: found.append(gradients.squared_norms())
            return Attribution(self.name, self.rows, context.infos, torch.cat(found)[:, None])  # type: ignore[arg-type]

    _, influence, _ = fit([FINE(), Settings(rows=[4, 90]), Settings("other", [4])], raises=True)
    one, other = influence.report.attributions
    assert (one.method, one.rows.tolist(), other.method) == ("settings", [4, 90], "other")
    assert one.scores[0] == pytest.approx(other.scores[0]) and (one.scores > 0).all()
