"""Every example runs as its docstring says, and leaves behind what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import ROOT

from ine_callback import InfluenceReport

KEYS = {
    "auroc_influence",
    "auroc_margin",
    "auroc_loss",
    "auroc_mean_loss",
    "precision_at_flips",
    "flagged",
    "null_ks_p",
    "seconds_fit",
    "seconds_fit_plain",
    "params_identical",
}


def test_digits_finds_wrong_labels_and_writes_what_it_promises(program: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "folder with spaces" / "demo"
    printed = program("digits.py", "--out", str(out), "--epochs", "4")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) == KEYS
    assert summary["params_identical"] is True
    # chance is .5 and .1; four epochs at any seed tried give .98 and more
    assert summary["auroc_influence"] > 0.95 and summary["auroc_margin"] > 0.8 and summary["precision_at_flips"] > 0.7
    assert 0.5 < summary["auroc_loss"] <= 1 and 0.5 < summary["auroc_mean_loss"] <= 1
    assert 0 < summary["null_ks_p"] <= 1
    assert summary["seconds_fit"] > 0 and summary["seconds_fit_plain"] > 0

    report = InfluenceReport.load(out)
    assert report.queries == ("val", "margin", "self") and report.rows == 1437 and not report.unseen.size
    assert len(report.drop_list()) == summary["flagged"] > 0
    assert str(report.drop_list()[0]) in printed and "bit by bit" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().startswith("<!") and "</html>" in page and "self" in page
    assert (out / "scores.parquet").is_file()


def test_torch_loop_shows_and_saves_a_report(program: Callable[..., str], tmp_path: Path) -> None:
    printed = program("torch_loop.py", "--out", "report", "--epochs", "3")
    report = InfluenceReport.load(tmp_path / "report")
    assert report.queries == ("val", "margin", "self") and (report.observations == 3).all()
    assert "Influence report" in printed and f"{len(report.drop_list())} rows are flagged" in printed


def test_char_lm_asks_one_question_for_each_document(program: Callable[..., str], tmp_path: Path) -> None:
    printed = program("char_lm.py", "--out", "report", "--epochs", "6")
    report = InfluenceReport.load(tmp_path / "report")
    titles = [line[2:] for line in (ROOT / "examples/excerpt.txt").read_text().splitlines() if line.startswith("# ")]
    assert list(report.queries) == titles and len(titles) == 4
    assert report.run.captured_share == 1.0
    for title in titles:
        assert f"{title}: of the 10 rows that helped most" in printed
        assert f"row {report.top(1, title)[0].row:4d}" in printed


def test_a_documents_own_rows_help_it_more_than_others_do(program: Callable[..., str], tmp_path: Path) -> None:
    text = "# digits\n" + "0123456789" * 300 + "\n# letters\n" + "abcdefghijklm" * 230
    (tmp_path / "two.txt").write_text(text, encoding="utf-8")
    program("char_lm.py", "--text", "two.txt", "--out", "report", "--epochs", "3")
    report = InfluenceReport.load(tmp_path / "report")
    mu = report.scores.mu
    rows = len(mu)
    digits = np.arange(rows) < math.ceil(rows / 2)  # the documents are equally long and the first comes first
    assert mu[digits, 0].mean() > 0 > mu[~digits, 0].mean()
    assert mu[~digits, 1].mean() > 0 > mu[digits, 1].mean()


def test_a_text_without_titles_is_cut_in_parts(program: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("the quick brown fox jumps over the lazy dog. " * 120, encoding="utf-8")
    printed = program("char_lm.py", "--text", "plain.txt", "--epochs", "1")
    assert "from 8 documents" in printed and "part 8: of the 10 rows" in printed
