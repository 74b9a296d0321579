"""LightningCLI: the callback is turned on, off and tuned from YAML and from the command line, without touching code."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from ine_callback import FINE, GradientStore, InfluenceCallback, InfluenceReport, MarginQuery, PerClassQuery
from ine_callback.cli import main

Run = Callable[..., LightningCLI]
ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "examples" / "cli"
FIT = ["fit", "--config", str(CLI / "config.yaml")]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"]
QUIET = [*SHORT, "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]

# Every argument of the callback with a value that is not its default, as YAML holds it.
EVERY_OPTION: dict[str, Any] = {
    "queries": {"rows": [0, 1, 2], "margin": {"class_path": "ine_callback.MarginQuery"}, "own": "self"},
    "methods": [{"class_path": "ine_callback.FINE", "init_args": {"estimator": "auc", "null_draws": 3, "seed": 5}}],
    "enabled": False,
    "refresh_every": 2,
    "curvature_every": 3,
    "rank": 7,
    "discount": False,
    "max_dim": 33,
    "reservoir": 99,
    "initial_weights": "fixed",
    "max_query_rows": 44,
    "row_fn": f"{__name__}.first_rows",
    "num_rows": 77,
    "layers": ["net.*"],
    "uncaptured": "raise",
    "store": {"bytes_per_row": 512, "dtype": "float16"},
    "log_scores": False,
    "dirpath": "elsewhere",
    "show_rows": False,
    "on_error": "raise",
}


def first_rows(batch: Any) -> torch.Tensor:
    return torch.arange(len(batch[1]))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the app in this process with a command line of its own."""
    monkeypatch.syspath_prepend(str(CLI))
    monkeypatch.delitem(sys.modules, "main", raising=False)

    def command_line(*args: str) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["main.py", *args])
        return importlib.import_module("main").main()

    return command_line


def callback_of(cli: LightningCLI) -> InfluenceCallback:
    (found,) = [each for each in cli.trainer.callbacks if isinstance(each, InfluenceCallback)]
    return found


def with_callbacks(path: Path, callbacks: list[dict[str, Any]]) -> str:
    config = yaml.safe_load((CLI / "config.yaml").read_text(encoding="utf-8"))
    config["trainer"]["callbacks"] = callbacks
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return str(path)


def saved(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.rglob("scores.parquet"))


def test_the_yaml_turns_it_on_and_tunes_it(run: Run, tmp_path: Path) -> None:
    callback = callback_of(run(*FIT, *QUIET))
    digits = [f"digit/{k}" for k in range(10)]
    assert callback.report is not None and list(callback.report.queries) == ["val", "margin", *digits, "self"]
    assert [type(query) for query in callback.queries[2:]] == [MarginQuery, PerClassQuery]
    (fine,) = callback.methods
    assert isinstance(fine, FINE) and (fine.estimator, fine.null_draws) == ("gaussian", 8)
    assert callback.max_dim == 512 and callback.report.run.steps == 4
    (scores,) = saved(tmp_path)
    assert scores.parent == tmp_path / "lightning_logs" / "version_0" / "influence"
    assert InfluenceReport.load(scores.parent).queries == callback.report.queries


@pytest.mark.long
def test_the_program_is_turned_off_from_the_command_line(tmp_path: Path) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CLI / "main.py"), *FIT, *QUIET, "--trainer.callbacks.enabled=false"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max_epochs=1` reached" in done.stderr
    config = yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["callbacks"][0]["init_args"]["enabled"] is False
    assert not saved(tmp_path)


def test_on_and_off_train_the_same_weights(run: Run) -> None:
    few = "--trainer.callbacks.queries=[val,self]"
    on, off = run(*FIT, *QUIET, few), run(*FIT, *QUIET, few, "--trainer.callbacks.enabled=false")
    assert callback_of(on).report is not None and callback_of(off).report is None
    for a, b in zip(on.model.state_dict().values(), off.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_options_on_the_command_line_win_over_the_yaml(run: Run) -> None:
    options = [
        "--trainer.callbacks.refresh_every=3",
        "--trainer.callbacks.max_dim=64",
        "--trainer.callbacks.queries=self",
    ]
    callback = callback_of(run(*FIT, *QUIET, *options))
    assert (callback.refresh_every, callback.max_dim, callback.queries) == (3, 64, "self")
    assert callback.report is not None and callback.report.queries == ("self",)
    assert isinstance(callback.methods[0], FINE)  # what was not named stays


@pytest.mark.long
def test_it_is_added_on_the_command_line_alone(run: Run, tmp_path: Path) -> None:
    config = with_callbacks(tmp_path / "none.yaml", [])
    added = ["--trainer.callbacks+=ine_callback.InfluenceCallback", "--trainer.callbacks.queries=[val,self]"]
    callback = callback_of(run("fit", "--config", config, *QUIET, *added))
    assert callback.report is not None and callback.report.queries == ("val", "self")


NORMS = """
import numpy
import torch
from ine_callback import Attribution, FitEndMethod, PerSamplePass


class RowNorms(FitEndMethod):
    name = "row norms"

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def run(self, context):
        found = torch.zeros(context.rows, len(context.infos))

        def take(rows, gradients):
            found[rows] = gradients.squared_norms().pow(self.power / 2)[:, None]

        yield PerSamplePass(), take
        return Attribution(self.name, numpy.arange(context.rows), context.infos, found.numpy())

    def settings(self):
        return {"power": self.power}
"""


@pytest.mark.long
def test_a_method_of_another_package_is_named_in_yaml_and_shown_from_its_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "installed" / "row_norms"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(NORMS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    theirs = {"class_path": "row_norms.RowNorms", "init_args": {"power": 2.0}}
    options = {"queries": ["val", "self"], "methods": [{"class_path": "ine_callback.FINE"}, theirs]}
    entry = {"class_path": "ine_callback.InfluenceCallback", "init_args": options}
    report = callback_of(run("fit", "--config", with_callbacks(tmp_path / "theirs.yaml", [entry]), *QUIET)).report
    assert report is not None and report.queries == ("val", "self")
    (scores,) = saved(tmp_path)
    folder, read = scores.parent, InfluenceReport.load(scores.parent).attribution("row norms")
    assert read.settings == {"power": 2.0} and (read.scores > 0).all()
    assert "row norms" in (folder / "report.html").read_text(encoding="utf-8")
    monkeypatch.delitem(sys.modules, "row_norms")
    (package / "__init__.py").unlink()  # reading needs no code of theirs
    capsys.readouterr()
    assert main(["show", str(folder), "--method", "row norms"]) == 0
    assert "row norms" in capsys.readouterr().out


def test_every_option_is_settable_from_yaml(run: Run, tmp_path: Path) -> None:
    parameters = set(inspect.signature(InfluenceCallback.__init__).parameters) - {"self"}
    assert parameters == set(EVERY_OPTION), "a new option needs a value here"
    entry = {"class_path": "ine_callback.InfluenceCallback", "init_args": EVERY_OPTION}
    callback = callback_of(run("fit", "--config", with_callbacks(tmp_path / "all.yaml", [entry]), *QUIET))
    for name in parameters - {"queries", "methods", "row_fn", "dirpath", "store"}:
        assert getattr(callback, name) == EVERY_OPTION[name], name
    assert callback.store == GradientStore(512, "float16")
    (fine,) = callback.methods
    assert (fine.estimator, fine.null_draws, fine.seed) == ("auc", 3, 5)
    assert callback.row_fn is not None and callback.row_fn.__name__ == "first_rows"
    assert str(callback.dirpath) == "elsewhere"
    assert callback.queries["rows"] == [0, 1, 2] and isinstance(callback.queries["margin"], MarginQuery)


def test_every_option_works_when_it_is_on(run: Run, tmp_path: Path) -> None:
    options = EVERY_OPTION | {"enabled": True, "store": None}  # a store needs the discount
    entry = {"class_path": "ine_callback.InfluenceCallback", "init_args": options}
    callback = callback_of(run("fit", "--config", with_callbacks(tmp_path / "all.yaml", [entry]), *QUIET))
    report = callback.report
    assert report is not None and report.queries == ("rows", "margin", "self") and report.rows == 77
    assert (report.observations[:32] == 4).all() and not report.observations[32:].any()  # row_fn says rows 0 to 31
    meta = json.loads((tmp_path / "elsewhere" / "meta.json").read_text(encoding="utf-8"))
    assert meta["run"]["config"]["discount"] is False and meta["run"]["config"]["max_dim"] == 33


def test_the_config_that_a_run_saves_gives_the_same_report_again(run: Run, tmp_path: Path) -> None:
    changed = ["--trainer.callbacks.refresh_every=2", "--trainer.callbacks.queries=[val,self]"]
    first = callback_of(run(*FIT, *QUIET, *changed)).report
    again = callback_of(run("fit", "--config", str(tmp_path / "lightning_logs/version_0/config.yaml"))).report
    assert first is not None and again is not None and again.run.config["refresh_every"] == 2
    assert first.scores.mu == pytest.approx(again.scores.mu, rel=0, abs=0, nan_ok=True)
    assert len(saved(tmp_path)) == 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("refresh_every=0", ["refresh_every=0", "at least 1"]),
        ("on_error=sometimes", ["on_error", "sometimes", "warn"]),
        ("uncaptured=maybe", ["uncaptured", "maybe", "fallback"]),
        ("methods=[]", ["methods=[]", "FINE()"]),
        ("queries=nonsense", ["nonsense", "'val'", "'self'"]),
        ("no_such_option=1", ["no_such_option"]),
    ],
)
def test_a_wrong_option_ends_before_training_and_is_named(
    run: Run, option: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(*FIT, *QUIET, f"--trainer.callbacks.{option}")
    message = capsys.readouterr().err + str(caught.value)
    for word in words:
        assert word in message, message
