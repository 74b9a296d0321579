"""``ine-callback effects``: estimates of a file's columns are those of Python; faults are one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from ine_callback.cli import main
from ine_callback.effects import WCDE, EffectData, estimate
from ine_callback.effects.command import EXAMPLES
from ine_callback.effects.files import load
from tests.helpers.effect_files import GRAPH, effect_columns, save_effect_files
from tests.helpers.effect_runs import report_with_effects

ROLES = "--treatment A --outcome Y"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    save_effect_files(tmp_path)


def ran(line: str) -> int:
    return main(["effects", *shlex.split(line)])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_estimates_are_those_of_python(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"fit table.{kind} --graph graph.txt {ROLES} --estimand wcde --adjust C,M --nuisances linear --seed 3 --json"
    assert ran(line) == 0
    expected = estimate(EffectData(effect_columns(), "A", "Y", GRAPH), WCDE(adjust=["C", "M"]), "linear", seed=3)
    assert json.loads(capsys.readouterr().out) == [expected.to_dict()]


def test_saved_effects_are_shown_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(f"fit table.csv --graph '{GRAPH}' {ROLES} --estimand nie -o new/effects.parquet") == 0
    fitted = capsys.readouterr().out
    assert ran("show new/effects.parquet") == 0
    assert fitted == capsys.readouterr().out + f"{Path('new/effects.parquet')}\n"
    (found,) = load(Path("new/effects.parquet"))
    table = parquet.read_table("new/effects.parquet")
    name = "NIE of A on Y through {M}"
    assert table.column_names == ["row", f"{name}/influence", f"{name}/removal"] and len(table) == 600
    assert np.array_equal(table[f"{name}/removal"].to_numpy(), found.removal) and "NIE" in fitted


def test_files_of_short_names_are_still_read() -> None:
    """As they were before effects knew their mediators and edges."""
    assert ran(f"fit table.csv --graph '{GRAPH}' {ROLES} --estimand nie -o effects.parquet") == 0
    (whole,) = load(Path("effects.parquet"))
    table = parquet.read_table("effects.parquet")
    words = [{k: v for k, v in whole.to_dict().items() if k not in ("mediators", "edges")}]
    former = table.rename_columns(["row", "NIE/influence", "NIE/removal"])
    former = former.replace_schema_metadata({"ine_callback.effects": json.dumps(words)})
    parquet.write_table(former, "former.parquet")
    (found,) = load(Path("former.parquet"))
    assert (found.influence == whole.influence).all() and found.name == "NIE of A on Y" and found.edges == ()


def test_adjust_lists_sets_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(f"adjust graph.txt {ROLES} --estimand wcde") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "{C, M}: of the lowest variance" and len(lines) == 4
    assert lines[0].startswith("{}: no: condition 1: {} leaves a back-door path open between A and Y; condition 3")
    assert ran(f"adjust graph.txt {ROLES} --hidden C") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("{C}: not observed: {C}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"fit none.csv --graph graph.txt {ROLES}", "none.csv"),
        (f"fit graph.txt --graph graph.txt {ROLES}", "graph.txt is no .parquet or .csv file"),
        (f"fit table.csv --graph 'A -> Y; Y -> A' {ROLES}", "the graph has the cycle"),
        (f"fit table.csv --graph 'A -> Y; H -> Y' {ROLES}", "the graph has 'H', and the columns are"),
        (f"fit table.csv --graph graph.txt {ROLES} -o effects.csv", "effects.csv does not end in .parquet"),
        ("show table.parquet", "table.parquet holds no effects"),
        ("show graph.txt", "graph.txt is not a readable Parquet file"),
        (f"adjust 'A -> Y' {ROLES} --estimand nde", "NDE: nothing lies on a directed path"),
    ],
)
def test_faults_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("ine-callback: ")


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["effects"])
    assert ended.value.code == 0 and "effects adjust graph.txt" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        ran("fit table.csv")
    assert ended.value.code == 2


def test_examples_of_the_help_work(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip() for line in EXAMPLES.replace("\\\n", "").splitlines() if line.startswith("  ine-callback")]
    assert len(lines) == 5
    report_with_effects().save("run/influence")
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
