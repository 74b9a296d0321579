"""A method that fails costs nothing else, a careless one leaves no trace, one that cannot run is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ine_callback import BIF, FINE, InfluenceCallback, InfluenceReport
from ine_callback.errors import InfluenceError
from ine_callback.methods import FitContext, FitEndMethod, FitEndMethods, PerSamplePass
from ine_callback.scores import Attribution
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import QUIET, ROWS, Model, loaders
from tests.helpers.cases import mostly_long
from tests.helpers.fit_end import EXPECTED, INFO, Dots, Norms, assert_untouched, by_method, fit


def raising(self: Any, context: FitContext) -> Any:
    raise ValueError("no way")


def before_a_pass(self: Any, context: FitContext) -> Iterator[Any]:
    raise ArithmeticError("not yet")
    yield


def inside_take(self: Any, context: FitContext) -> Iterator[Any]:
    def take(rows: Tensor, gradients: Any) -> None:
        if 64 in rows:
            raise KeyError("row 64")

    yield PerSamplePass(), take


def after_a_pass(self: Any, context: FitContext) -> Iterator[Any]:
    yield PerSamplePass(), lambda rows, gradients: None
    raise RuntimeError("too late")


def with_scores(**fields: Any) -> Callable[[Any, FitContext], Any]:
    def run(self: Any, context: FitContext) -> Any:
        rows = np.arange(ROWS)
        return replace(Attribution("x", rows, context.infos, np.zeros((ROWS, 1))), **fields)

    return run


BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (raising, "ValueError: no way"),
    "raises before a pass": (before_a_pass, "ArithmeticError: not yet"),
    "raises in a pass": (inside_take, "KeyError: 'row 64'"),
    "raises after a pass": (after_a_pass, "RuntimeError: too late"),
    "returns nothing": (lambda self, context: None, "run() returned NoneType; return an Attribution."),
    "returns a dict": (lambda self, context: {}, "run() returned dict; return an Attribution."),
    "yields a number": (lambda self, context: (k for k in range(3)), "run() yielded 0; yield a PerSamplePass"),
    "yields a triple": (lambda self, context: (k for k in [(1, 2, 3)]), "run() yielded (1, 2, 3); yield a Per"),
    "yields no function": (
        lambda self, context: (k for k in [(PerSamplePass(), 3)]), "yield a PerSamplePass and a function take(",
    ),
    "returns nothing after a pass": (
        lambda self, context: (k for k in [(PerSamplePass(), print)]), "run() returned NoneType",
    ),
    "scores of a vector": (with_scores(scores=np.zeros(ROWS)), "scores has shape (96,), expected (96, 1)"),
    "rows that are not there": (with_scores(rows=np.arange(1, ROWS + 1)), "run() scored row 96; there are rows 0"),
    "rows twice": (with_scores(rows=np.zeros(ROWS, dtype=int)), "rows must list dataset indices, at least one"),
    "scores of text": (with_scores(scores=np.full((ROWS, 1), "x")), "scores has type <U1, expected float64"),
    "an unknown column": (with_scores(ranked_by="best"), "ranked_by='best' is none of its columns []"),
    "labels that cannot be listed": (
        lambda self, context: (k for k in [(PerSamplePass("all"), print)]), "labels='all' is none of true, sampled",  # type: ignore[arg-type]
    ),
    "a layer that is not there": (lambda self, context: list(context.features("nothing")), "no attribute `nothing`"),
}  # fmt: skip


def broken_method(case: str) -> FitEndMethod:
    method: FitEndMethod = type("Broken", (FitEndMethod,), {"name": f"broken: {case}", "run": BROKEN[case][0]})()
    return method


def test_methods_that_fail_cost_nothing_else(alone: tuple[Model, Any], tmp_path: Path) -> None:
    """All of them in one fit, the first and the last of its methods among them."""
    first, *others = map(broken_method, BROKEN)
    with pytest.warns(UserWarning, match=r"broken: .* failed: .* The report holds the rest"):
        model, influence, _ = fit([first, FINE(), Norms(), *others[:-1], Dots(), others[-1]], dirpath=tmp_path)
    assert_untouched(model, alone)
    report = influence.report
    assert set(by_method(report)) == EXPECTED - {("gradient norm", 1)}
    assert all(np.isfinite(each.scores).all() for each in report.attributions)
    for case, (_, why) in BROKEN.items():
        (note,) = [note for note in report.run.notes if note.startswith(f"broken: {case} failed: ")]
        assert why in note
    again = InfluenceReport.load(tmp_path)
    assert again.run.notes == report.run.notes
    assert_same(again.attributions, report.attributions)


@pytest.mark.parametrize("case", mostly_long(BROKEN, "raises", "raises in a pass", "returns nothing"))
def test_a_method_that_fails_raises_where_that_is_asked_for(case: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # of any kind
        fit([FINE(), broken_method(case)], raises=True)


def test_a_method_that_fails_in_the_middle_runs_again_at_the_end(alone: tuple[Model, Any]) -> None:
    class Once(Norms):
        name = "once"

        def run(self, context: FitContext) -> Any:
            if context.at == 1:
                raise ValueError("too early")
            return (yield from super().run(context))

    with pytest.warns(UserWarning, match="once failed"):
        model, influence, _ = fit([FINE(), Once([1, "end"])])
    assert_untouched(model, alone)
    assert set(by_method(influence.report)) == {("once", "end")}


class Careless(FitEndMethod):
    """Leaves behind whatever a method can leave."""

    name, at = "careless", [1, "end"]

    def run(self, context: FitContext) -> Any:
        module: Any = context.module
        module.train()
        torch.rand(7), np.random.random(3)
        module.net[0].register_forward_hook(lambda module, args, out: out * 2)
        module.loose, module.seen = 3, []
        module.net(torch.randn(8, 5)).sum().backward()
        module.net[1].running_mean.add_(1.0)
        module.accuracy.update(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
        for p in module.parameters():
            p.requires_grad_(False)
        if context.at == 1:
            raise ValueError("and fails")
        return Attribution(self.name, np.arange(2), context.infos, np.zeros((2, 1)))


def test_a_careless_method_leaves_no_trace_in_the_training(alone: tuple[Model, Any]) -> None:
    with pytest.warns(UserWarning, match="careless failed: ValueError: and fails"):
        model, influence, _ = fit([FINE(), Careless()])
    assert_untouched(model, alone)
    assert model.training and all(p.requires_grad for p in model.parameters()) and not hasattr(model, "loose")
    assert not model.net[0]._forward_hooks and [each.at for each in influence.report.attributions] == ["end"]


# -- what is refused before training -----------------------------------------------------------------------------------


def test_what_a_method_lacks_is_told_before_training() -> None:
    with pytest.raises(InfluenceError, match="gradient norm has no query: 'self' is f-INE's alone"):
        fit([FINE(), Norms()], raises=True, queries="self")
    methods = FitEndMethods([Norms()], "Test")
    with pytest.raises(InfluenceError, match="gradient norm needs the whole weights in each process; leave it out"):
        methods.check([INFO], True, "")
    with pytest.raises(InfluenceError, match="gradient norm reads training rows by their index, but they are secret; "):
        methods.check([INFO], False, "they are secret")
    free = type("Free", (Norms,), {"needs": ()})()
    FitEndMethods([free], "Test").check([], True, "they are secret")


def test_an_iterable_training_set_has_no_rows_by_index() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(TensorDataset(*loaders()[0].dataset.tensors))  # type: ignore[attr-defined]

    loader = DataLoader(Stream(), batch_size=16)
    influence = InfluenceCallback(
        "val", [FINE(), Norms()], row_fn=lambda batch: torch.arange(16), num_rows=96, on_error="raise"
    )
    trainer = L.Trainer(max_epochs=1, callbacks=[influence], logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(InfluenceError, match="reads training rows by their index, but this training set has no"):
        trainer.fit(Model(), loader, loaders()[1])


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ([Norms(), Norms()], r"\['gradient norm', 'gradient norm'\] would have one name in the report"),
        ([BIF(), type("Bif", (Norms,), {"name": "bif"})()], r"\['BIF', 'bif'\] would have one name"),
        ([type("Nameless", (Norms,), {"name": " "})()], "Nameless has no name; set name = 'my method'"),
        ([type("Bare", (FitEndMethod,), {"run": raising})()], "Bare has no name; set name = 'my method'"),
        ([Norms(["start"])], r"gradient norm: at=\['start'\] must list different numbers"),
        ([Norms([1, 1])], r"gradient norm: at=\[1, 1\] must list different numbers"),
    ],
)
def test_methods_that_cannot_be_told_apart_or_run_are_refused(methods: list[Any], told: str) -> None:
    with pytest.raises(InfluenceError, match=told):
        InfluenceCallback("val", [FINE(), *methods])
