"""``ine-callback ask``: a report, a checkpoint and a batch in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ine_callback.cli import main
from tests.helpers.stored_fit import Classifier, fit

MODULE = f"{Classifier.__module__}:Classifier"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a store, a checkpoint and two batches."""
    path = tmp_path_factory.mktemp("asked")
    fit(path)
    rng = np.random.default_rng(0)
    np.savez(path / "mine.npz", rng.normal(size=(4, 5)).astype(np.float32), rng.integers(0, 3, 4))
    return path


def test_a_batch_in_a_file_is_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(folder / "report"), "--module", MODULE, "--checkpoint", str(folder / "last.ckpt")]
    assert main(["ask", *asked, "--query", str(folder / "mine.npz"), "--top", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["queries"]["mine"]["top"]) == 3
    assert main(["ask", *asked, "--query", str(folder / "mine.npz"), "-o", str(folder / "all.npz")]) == 0
    assert "most harmful" in capsys.readouterr().out
    with np.load(folder / "all.npz") as found:
        assert found["scores"].shape == (40, 1)
        assert found["scores"][:, 0].argsort()[::-1][:3].tolist() == said["queries"]["mine"]["top"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--module", "Classifier"], "is not PACKAGE:CLASS"),
        (["--module", "json:dumps"], "is no LightningModule"),
        (["--module", "nowhere:Net"], "cannot be imported"),
        (["--checkpoint", "missing.ckpt"], "missing.ckpt is no file"),
        (["--query", "missing.npz"], "missing.npz is no .npz of arrays"),
    ],
)
def test_what_cannot_be_asked_is_named(
    folder: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--module", MODULE, "--checkpoint", str(folder / "last.ckpt"), "--query", str(folder / "mine.npz")]
    if change[0] == "--query":
        asked = asked[:4]
    assert main(["ask", str(folder / "report"), *asked, *change]) == 2
    assert message in capsys.readouterr().err
