"""Every example runs as its docstring says, and leaves behind what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ine_callback import InfluenceCallback, InfluenceReport, TokenMask

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]

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
    printed = program("digits.py", "--out", str(out), "--epochs", "3")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) == KEYS
    assert summary["params_identical"] is True
    # chance is .5, .5 and .1; what three epochs give is .99, .93 and .9
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
    assert (
        f'<figure data-row="{report.drop_list()[0]}">' in page and page.count("data:image/png") > 60
    )  # some rows are at several ends
    assert (out / "scores.parquet").is_file()


@pytest.mark.long
def test_torch_loop_shows_and_saves_a_report(program: Callable[..., str], tmp_path: Path) -> None:
    printed = program("torch_loop.py", "--out", "report", "--epochs", "2")
    report = InfluenceReport.load(tmp_path / "report")
    assert report.queries == ("val", "margin", "self") and (report.observations == 2).all()
    assert "Influence report" in printed and f"{len(report.drop_list())} rows are flagged" in printed


@pytest.mark.long
def test_char_lm_asks_one_question_for_each_document(program: Callable[..., str], tmp_path: Path) -> None:
    printed = program("char_lm.py", "--out", "report", "--epochs", "3")
    report = InfluenceReport.load(tmp_path / "report")
    titles = [line[2:] for line in (ROOT / "examples/excerpt.txt").read_text().splitlines() if line.startswith("# ")]
    assert list(report.queries) == titles and len(titles) == 4
    assert report.run.captured_share == 1.0
    for title in titles:
        assert f"{title}: of the 10 rows that helped most" in printed
        assert f"row {report.top(1, title)[0].row:4d}" in printed


@pytest.mark.long
def test_bif_char_lm_shows_which_characters_helped(program: Callable[..., str], tmp_path: Path) -> None:
    few = ("--epochs", "2", "--rows", "4", "--draws", "6", "--characters", "3000")
    printed = program("bif_char_lm.py", "--out", "report", *few)
    report = InfluenceReport.load(tmp_path / "report")
    assert [found.at for found in report.stages("BIF")] == [1, "end"]
    assert report.bif.tokens is not None and report.bif.tokens.scores.shape == (4 * 48, len(report.queries))
    assert 'class="helps"' in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for title in report.queries:
        assert f"{title}: rank agreement of BIF with f-INE's μ" in printed
        assert f"row {report.bif.top(1, title)[0]:4d}" in printed


def test_a_documents_own_rows_help_it_more_than_others_do(example: Load, tmp_path: Path) -> None:
    lm = example("char_lm.py")
    texts = {"digits": "0123456789" * 200, "letters": "abcdefghijklm" * 154}
    alphabet = "".join(sorted(set("".join(texts.values()))))
    rows, held_out = lm.rows_of(texts)
    queries = {title: lm.encode(pieces, alphabet) for title, pieces in held_out.items()}
    influence = InfluenceCallback(queries=queries, on_error="raise")
    lm.fit(lm.encode([piece for _, piece in rows], alphabet), len(alphabet), [influence], epochs=3, seed=0)
    mu = influence.report.scores.mu
    digits = np.array([title == "digits" for title, _ in rows])
    assert mu[digits, 0].mean() > 0 > mu[~digits, 0].mean()
    assert mu[~digits, 1].mean() > 0 > mu[digits, 1].mean()


def test_a_text_without_titles_is_cut_in_eight_parts(example: Load) -> None:
    documents = example("char_lm.py").documents
    text = "the quick brown fox " * 50 + "!"
    assert "".join(documents(text).values()) == text and list(documents(text))[7] == "part 8"
    assert documents("# a\nx\n# b\ny\n# not a title") == {"a": "x\n", "b": "y\n# not a title"}


def test_held_out_rows_are_not_trained_on(example: Load) -> None:
    text = "".join(chr(200 + k) for k in range(48 * 20 + 1))  # no character twice
    train, held_out = example("char_lm.py").rows_of({"a": text})
    assert len(train) == 18 and len(held_out["a"]) == 2
    trained = {character for _, piece in train for character in piece[:48]}
    assert not trained & {character for piece in held_out["a"] for character in piece[:48]}


@pytest.mark.long  # ten trainings
def test_retrain_compares_what_is_dropped(program: Callable[..., str]) -> None:
    printed = program("retrain.py", "--seeds", "2", "--epochs", "1")
    lines = {line[:18].strip(): line[18:].split() for line in printed.splitlines() if "±" in line}
    assert {"nothing", "drop_list(q=.05)", "highest loss", "random rows"} <= set(lines)
    assert lines["nothing"][0] == "0" and lines["drop_list(q=.05)"][0] == lines["random rows"][0]


@pytest.mark.long
def test_poison_finds_who_taught_the_odd_answer(example: Load) -> None:
    found = example("poison.py").one_seed(seed=0, epochs=6)
    worked, accuracy = found.pop("")
    assert worked > 0.9 and accuracy > 0.9
    # of 30 poisoned rows chance has 0.75 among the first 30; one odd answer finds 22.6 of them, ten find 27.6
    assert found["f-INE, margin of one odd answer"][0] > 12 and found["f-INE, mean margin of ten"][0] > 20
    assert found["f-INE, mean margin of ten"][2] < 0.1 and found["at random"][2] > 0.9


@pytest.mark.long
def test_suppress_tokens_trains_a_model_that_curses_less(program: Callable[..., str], tmp_path: Path) -> None:
    printed = program("suppress_tokens.py", "--out", "mask", "--epochs", "12", "--characters", "9000")
    mask = TokenMask.load(tmp_path / "mask" / "mask.parquet")
    assert f"{len(mask)} of {mask.tokens} characters are suppressed" in printed and mask.share <= 0.05
    assert "trained as it is:" in printed and "trained suppressed:" in printed


@pytest.mark.long
def test_suppress_tokens_with_hugging_face(program: Callable[..., str]) -> None:
    pytest.importorskip("transformers")
    printed = program("suppress_tokens_hf.py", "--out", "folder")
    plain, careful = (float(line.split(": ")[1].split("%")[0]) for line in printed.splitlines() if "trained " in line)
    assert plain > 10 and careful < plain / 3
