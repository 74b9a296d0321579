"""Methods that run on a trained model, side by side: what each found is in the report, none costs another anything."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ine_callback import BIF, FINE, CallableQuery, InfluenceCallback, InfluenceReport
from ine_callback.errors import InfluenceError
from ine_callback.integrations.callback import KEY
from ine_callback.methods import FitContext, FitEndMethod, FitEndMethods, PerSamplePass
from ine_callback.methods.fit_end import Interrupted
from ine_callback.queries.sources import DataSource
from ine_callback.scores import Attribution, LayerScores, QueryInfo
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import QUIET, ROWS, SHORT_CHAINS, Model, loaders

INFO = QueryInfo("val", "loss", "Does it help?")


class Norms(FitEndMethod):
    """Norm of each row's gradient; one buffer for all stages."""

    name = "gradient norm"

    def __init__(self, at: Sequence[Any] = ("end",), rows: Any = None) -> None:
        self.at, self.rows, self.kept = at, rows, np.zeros((ROWS, 1))

    def run(self, context: FitContext) -> Any:
        self.kept[:] = 0

        def take(rows: Tensor, gradients: Any) -> None:
            self.kept[rows.numpy(), 0] += gradients.squared_norms().cpu().numpy()

        yield PerSamplePass(rows=self.rows), take
        return Attribution(self.name, np.arange(context.rows), context.infos[:1], self.kept)


class Dots(FitEndMethod):
    """Inner product of each row's gradient with the queries', by layer; two passes."""

    name, at = "gradient dot", [1, "end"]

    def run(self, context: FitContext) -> Any:
        found: list[Tensor] = []
        yield PerSamplePass(), lambda rows, gradients: None
        directions = context.query_gradients()
        yield PerSamplePass(), lambda rows, gradients: found.append(gradients.products(directions))
        scores = torch.cat(found).cpu().double().numpy()
        layers = LayerScores(("all", "none"), np.stack([scores, 0 * scores], 1))
        return Attribution(self.name, np.arange(context.rows), context.infos, scores, layers=layers)

    def settings(self) -> dict[str, Any]:
        return {"passes": 2, "kind": Path("a path")}


class Plain(FitEndMethod):
    """A function in one piece, that scores three rows."""

    name = "plain"

    def run(self, context: FitContext) -> Attribution:
        return Attribution("another name", [5, 3, 4], context.infos, np.ones((3, 1)), notes=("a note",))  # type: ignore[arg-type]


class Counting(L.Callback):
    """Forward passes of the module, when training is over."""

    def __init__(self) -> None:
        self.passes, self.on = 0, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def count(*_: Any) -> None:
            self.passes += self.on

        pl_module.net.register_forward_hook(count)  # type: ignore[union-attr, operator]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on = True


def fit(methods: Any, raises: bool = False, epochs: int = 2, **options: Any) -> tuple[Model, Any, L.Trainer]:
    """A fit with these methods; the callback comes back with it."""
    ready = loaders()
    torch.manual_seed(1)
    model = Model()
    influence = InfluenceCallback(
        options.pop("queries", "val"),
        methods,
        dirpath=options.pop("dirpath", None),
        on_error="raise" if raises else "warn",
    )
    ckpt, callbacks = options.pop("ckpt_path", None), options.pop("callbacks", [])
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, **QUIET}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[*callbacks, influence], **quiet | options)
    trainer.fit(model, *options.pop("data", ready), ckpt_path=ckpt)
    return model, influence, trainer


def by_method(report: Any) -> dict[tuple[str, Any], Attribution]:
    return {(each.method, each.at): each for each in report.attributions}


@pytest.fixture(scope="module")
def alone() -> tuple[Model, Any]:
    """The training with f-INE alone."""
    model, influence, _ = fit([FINE()])
    return model, influence.report


@pytest.fixture(scope="module")
def together() -> tuple[Model, Any]:
    """All methods in one fit."""
    model, influence, _ = fit([FINE(), Norms([1, "end"]), Dots(), BIF(**SHORT_CHAINS), Plain()], raises=True)  # type: ignore[arg-type]
    return model, influence.report


def assert_untouched(model: Model, alone: tuple[Model, Any]) -> None:
    """The same training, to the last bit."""
    assert model.seen == alone[0].seen
    for name, value in alone[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


EXPECTED = {("gradient norm", 1), ("gradient norm", "end"), ("gradient dot", 1), ("gradient dot", "end")}


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


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1::6])
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


# ---- accidents ----


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


@pytest.mark.parametrize("case", BROKEN)
def test_a_method_that_fails_costs_nothing_else(case: str, alone: tuple[Model, Any], tmp_path: Path) -> None:
    run, why = BROKEN[case]
    broken = type("Broken", (FitEndMethod,), {"name": "broken", "run": run})()
    with pytest.warns(UserWarning, match=r"broken failed: .* The report holds the rest"):
        model, influence, _ = fit([broken, FINE(), Norms(), Dots()], dirpath=tmp_path)
    assert_untouched(model, alone)
    report = influence.report
    assert set(by_method(report)) == EXPECTED - {("gradient norm", 1)}
    assert all(np.isfinite(each.scores).all() for each in report.attributions)
    (note,) = [note for note in report.run.notes if "broken" in note]
    assert note.startswith("broken failed: ") and why in note
    again = InfluenceReport.load(tmp_path)
    assert again.run.notes == report.run.notes
    assert_same(again.attributions, report.attributions)
    with pytest.raises(Exception):  # noqa: B017, PT011  # for tests of methods
        fit([FINE(), broken], raises=True)


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


# ---- stages, checkpoints, Ctrl-C ----


def test_stages_that_never_came_are_told(alone: tuple[Model, Any]) -> None:
    model, influence, _ = fit([FINE(), Norms([1, 7, 9, "end"])], raises=True)
    assert_untouched(model, alone)
    assert [each.at for each in influence.report.attributions] == [1, "end"]
    (note,) = [note for note in influence.report.run.notes if "gradient norm" in note]
    assert note == "gradient norm: training ended before epochs [7, 9] of at=[1, 7, 9, 'end']"


def test_a_resumed_fit_has_the_stages_before(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [FINE(), Norms([1, 2, "end"]), Dots(), BIF(**SHORT_CHAINS, at=[1, "end"])]  # type: ignore[arg-type]

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _, whole, _ = fit(methods(), raises=True, epochs=2, callbacks=[saving], enable_checkpointing=True)
    path = next(tmp_path.glob("epoch=0*"))
    state = torch.load(path, weights_only=True)[KEY]["fit_end"]  # what Lightning may load it with
    assert [each["method"] for each in state["found"]] == ["BIF", "gradient norm", "gradient dot"]
    _, resumed, _ = fit(methods(), raises=True, epochs=2, ckpt_path=path)
    found, expected = by_method(resumed.report), by_method(whole.report)
    assert set(found) == set(expected) and len(found) == 7
    for key in [key for key in expected if key[1] == 1]:
        assert_same(found[key], expected[key])
    assert not [note for note in resumed.report.run.notes if "ended before" in note]


def test_scores_of_a_damaged_checkpoint_cost_not_the_recording(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit([FINE(), Dots()], raises=True, epochs=1, callbacks=[saving], enable_checkpointing=True)
    path = next(tmp_path.glob("epoch=0*"))
    saved = torch.load(path, weights_only=True)
    del saved[KEY]["fit_end"]["found"][0]["scores"]
    torch.save(saved, path)
    with pytest.warns(UserWarning, match="scores of earlier stages are lost: TypeError"):
        _, influence, _ = fit([FINE(), Dots()], ckpt_path=path)
    report = influence.report
    assert [each.at for each in report.attributions] == ["end"] and report.run.steps == 12


class Stopped(Norms):
    """Ctrl-C comes while it runs; what it has is kept, or not."""

    name = "stopped"

    def __init__(self, at: Any, keeps: bool) -> None:
        super().__init__([at])
        self.keeps = keeps

    def run(self, context: FitContext) -> Any:
        def take(rows: Tensor, gradients: Any) -> None:
            if 64 in rows:
                found = Attribution("x", np.arange(64), context.infos, np.ones((64, 1)), notes=("64 of 96 rows",))
                raise Interrupted(found) if self.keeps else KeyboardInterrupt

        yield PerSamplePass(), take


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.filterwarnings("ignore:.*was ended by Ctrl-C")
def test_ctrl_c_in_the_middle_ends_the_fit_and_leaves_a_report(keeps: bool, tmp_path: Path) -> None:
    other = type("Other", (Norms,), {"name": "other"})([1, "end"])
    ready = loaders()
    torch.manual_seed(1)
    influence = InfluenceCallback("val", [FINE(), Stopped(1, keeps), other, Plain()], dirpath=tmp_path)
    trainer = L.Trainer(max_epochs=3, callbacks=[influence], logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(SystemExit):
        trainer.fit(Model(), *ready)
    report = InfluenceReport.load(tmp_path)
    assert report.run.steps == 6 and set(by_method(report)) == ({("stopped", 1)} if keeps else set())
    told = [note for note in report.run.notes if "Ctrl-C" in note]
    assert [note.split()[0] for note in told] == (["other"] if keeps else ["stopped", "other"])
    if keeps:
        assert (
            report.attribution("stopped").notes == ("64 of 96 rows",) and len(report.attribution("stopped").rows) == 64
        )


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.filterwarnings("ignore:.*was ended by Ctrl-C")
def test_ctrl_c_at_the_end_ends_one_method(keeps: bool, alone: tuple[Model, Any], tmp_path: Path) -> None:
    model, _, _ = fit([FINE(), Stopped("end", keeps), Dots(), Plain()], dirpath=tmp_path)
    assert_untouched(model, alone)
    report = InfluenceReport.load(tmp_path)
    others = {("gradient dot", 1), ("gradient dot", "end"), ("plain", "end")}
    assert set(by_method(report)) == others | ({("stopped", "end")} if keeps else set())
    assert [note for note in report.run.notes if "Ctrl-C" in note] == (
        [] if keeps else ["stopped was ended by Ctrl-C."]
    )


# ---- what is refused before training ----


def test_what_a_method_lacks_is_told_before_training() -> None:
    with pytest.raises(InfluenceError, match="gradient norm has no query: 'self' is f-INE's alone"):
        fit([FINE(), Norms()], raises=True, queries="self")
    methods = FitEndMethods([Norms()], "Test")
    with pytest.raises(InfluenceError, match="gradient norm needs the whole weights in each process; leave it out"):
        methods.check([INFO], True, lambda: "")
    with pytest.raises(InfluenceError, match="gradient norm reads training rows by their index, but they are secret; "):
        methods.check([INFO], False, lambda: "they are secret")
    free = type("Free", (Norms,), {"needs": ()})()
    FitEndMethods([free], "Test").check([], True, lambda: "they are secret")


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


def test_a_stage_that_is_reached_again_replaces_what_was_found() -> None:
    """As when training is resumed from before a stage that it had reached."""
    methods = FitEndMethods([Plain()], "Test", "raise")
    for title in ("old", "new"):
        loader = loaders()[0]
        source = DataSource("Test", lambda module, batch: module.training_step(batch, 0), loader, [loader], 10**6)
        query = CallableQuery(source.loss, next(iter(loader))).bind("q", source)
        methods.run(FitContext(Model(), query, source, source.loss, owner="Test"))
        methods.found = [replace(each, title=each.title or title) for each in methods.found]
    assert [each.title for each in methods.found] == ["new"]


def test_the_state_is_plain() -> None:
    """It loads where nothing but tensors and plain types may be loaded, and is a copy."""
    methods = FitEndMethods([], "Test")
    methods.found = [Attribution("x", np.arange(2), (INFO,), np.ones((2, 1)), columns={"c": np.zeros((2, 1))})]
    methods.notes, methods._reached = ["a note"], {1, "end"}
    torch.save(methods.state_dict(), file := io.BytesIO())
    file.seek(0)
    again = FitEndMethods([], "Test")
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same(again.found, methods.found)
    assert again.notes == ["a note"] and again._reached == {1, "end"}
