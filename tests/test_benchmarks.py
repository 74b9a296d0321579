"""The benchmarks run in their quick form and render as Markdown."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest


def run(module: str, *arguments: str) -> str:
    """What ``python -m benchmarks.<module>`` prints; called here, so that torch is not imported for each of them."""
    name = f"benchmarks.{module}"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        name += ".__main__"
    with redirect_stdout(StringIO()) as printed:
        importlib.import_module(name).main(arguments)
    return printed.getvalue()


@pytest.mark.parametrize(
    ("call", "title"),
    [
        pytest.param("runs", "## Several runs", marks=pytest.mark.long),
        pytest.param("mislabel", "## Wrong labels", marks=pytest.mark.long),
        ("cleanup", "## Acting on it"),
        pytest.param("fidelity --family", "## A family of protocols", marks=pytest.mark.long),
        pytest.param("finetuning --dropout 0.1", "## Fine-tuning a small language model", marks=pytest.mark.long),
        pytest.param("randomness", "## Stability", marks=pytest.mark.long),
        ("overhead", "## Overhead"),
        pytest.param("overhead.trainer", "## Trainer runs", marks=pytest.mark.long),
        pytest.param("overhead.profile", "## Operations of a step", marks=pytest.mark.long),
        ("layers", "## Pruning by the sensitivity of blocks"),
        ("scale", "## Growth with rows"),
        pytest.param("values", "## Values against clean rows", marks=pytest.mark.long),
        pytest.param("values_airrep", "## Values learned from retraining", marks=pytest.mark.long),
        pytest.param("influence", "## Influence functions at the trained weights", marks=pytest.mark.long),
        pytest.param("tokens", "## Token influence", marks=pytest.mark.long),
        pytest.param("label_errors", "## Label errors", marks=pytest.mark.long),
        pytest.param("effects", "## Effects", marks=pytest.mark.long),
        pytest.param("fairness", "## Fair subspaces", marks=pytest.mark.long),
        ("store --parts speed", "## Gradient store: speed and cost"),
        pytest.param("store --protocols g2 ft", "## Gradient store: accuracy over bytes", marks=pytest.mark.long),
        pytest.param("bif --variants 'reduced (default)'", "## BIF by the number of draws", marks=pytest.mark.long),
        pytest.param("lds --problems transformer --only run", "## Retraining, transformer", marks=pytest.mark.long),
        pytest.param(
            "lds --problems logistic --only BIF", "| ine_callback BIF, Laplace term |", marks=pytest.mark.long
        ),
        pytest.param("lds", "## Protocol G2", marks=pytest.mark.long),
        pytest.param("fidelity", "## Protocol G1", marks=pytest.mark.long),
        pytest.param("fidelity --optimizers sgd", "Influence of a row on its own loss", marks=pytest.mark.long),
        pytest.param("fidelity --sweep", "## Protocol G1", marks=pytest.mark.long),
    ],
)
def test_quick_form_runs_and_renders(call: str, title: str, tmp_path: Path) -> None:
    file, plots = tmp_path / "found.json", tmp_path / "plots"
    run(*shlex.split(call), "--quick", "--json", str(file))
    assert json.loads(file.read_text())["protocol"]
    assert title in run("results", str(file), "--plots", str(plots))


def test_rescaled_influence_is_what_leaving_a_row_out_does() -> None:
    """At n = 200, d = 64 the plain one underestimates it by four."""
    found = importlib.import_module("benchmarks.influence.calibration").logistic(0, 1e-4)
    alone = found["single rows, own logit"]
    assert 0.9 < alone["RIF"]["slope"] < 1.1 and alone["IF"]["slope"] < 0.5
    groups = found["cluster groups, test logits"]
    assert 0.8 < groups["Newton step"]["slope"] < 1.2 and groups["RIF"]["slope"] < 0.7 > groups["IF"]["slope"]


@pytest.mark.skipif(not importlib.util.find_spec("devinterp"), reason="devinterp is not installed")
def test_devinterp_samples_the_same_posterior(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    run("bif_devinterp", "--quick", "--json", str(file))
    assert "## BIF beside devinterp" in run("results", str(file))
    # a setting taken for half or twice its value moves the scale by that much
    assert 0.7 < json.loads(file.read_text())["scale"] < 1.4
