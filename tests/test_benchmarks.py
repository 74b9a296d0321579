"""The benchmarks run in their quick form and render as Markdown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("module", "title"),
    [
        ("runs", "## Several runs"),
        ("mislabel", "## Wrong labels"),
        pytest.param("lds", "## Protocol G2", marks=pytest.mark.long),
        pytest.param("fidelity", "## Protocol G1", marks=pytest.mark.long),
    ],
)
def test_quick_form_runs_and_renders(module: str, title: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    run(module, "--quick", "--json", str(file))
    assert json.loads(file.read_text())["protocol"]
    assert title in run("results", str(file))
