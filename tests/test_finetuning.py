"""The parts of benchmarks.finetuning: documents, the truth's file, scores at the end, and their judgement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.finetuning import scores
from benchmarks.finetuning.judge import judge, lds, slope
from benchmarks.finetuning.model import Training, document_losses, token_loss
from benchmarks.finetuning.text import IGNORED, Sizes, Task, Tokenizer, documents, make
from benchmarks.finetuning.truth import Counts, Kept, Truth, halves

SIZES = Sizes(rows=20, queries=4, length=24, vocabulary=96)
TRAINING = Training(width=8, depth=1, pretraining=4, epochs=1, batch=8)
COUNTS = Counts(halves=3, seeds=2, all_rows=2)


@pytest.fixture(scope="module")
def task() -> Task:
    return make(data.excerpt().replace("\n", "\n\n"), SIZES)  # a line is a speech


def test_tokens_give_the_text_back() -> None:
    text = data.excerpt()
    tokenizer = Tokenizer(text, 120)
    assert len(tokenizer.tokens) == 120
    assert "".join(tokenizer.tokens[k] for k in tokenizer.encode(text)) == text


def test_documents_are_whole_or_cut_speeches_in_order() -> None:
    speeches = [[k] * 10 for k in range(32)]
    assert documents(speeches, 20, 16) == [[k] * 10 + [k + 1] * 10 for k in range(0, 32, 2)]
    assert documents([[1] * 50] * 8, 20, 16)[:2] == [[1] * 20, [1] * 20]


def test_a_target_is_the_next_input(task: Task) -> None:
    assert bool((task.x[:, 0] == 0).all()) and task.x.shape == task.y.shape == (20, 24)
    follows = task.x[:, 1:] != 0
    assert bool((task.y[:, :-1][follows] == task.x[:, 1:][follows]).all())
    assert bool((task.y == IGNORED).any())


def test_the_truth_is_kept_and_not_mistaken(task: Task, tmp_path: Path) -> None:
    file = tmp_path / "truth.pt"
    first = Kept(task, TRAINING, COUNTS, file).truth(0.1)
    again = Kept(task, TRAINING, COUNTS, file).truth(0.1)
    assert first.losses.shape == (2, 3, 4) and first.seconds == again.seconds
    np.testing.assert_array_equal(first.losses, again.losses)
    np.testing.assert_array_equal(first.all_rows, Kept(task, TRAINING, COUNTS, None).truth(0.1).all_rows)
    with pytest.raises(SystemExit, match="holds another truth"):
        Kept(task, replace(TRAINING, lr=1e-4), COUNTS, file)
    assert not np.array_equal(first.losses[0], first.losses[1]) and bool((first.masks.sum(1) == 10).all())


def test_halves_are_independent() -> None:
    masks = np.zeros((60, 100))
    np.put_along_axis(masks, halves(100, 60).numpy(), 1.0, 1)
    assert np.abs(np.corrcoef(masks)[np.triu_indices(60, 1)]).max() < 0.5  # complementary ones have -1


def test_tracin_at_the_end_is_the_product_of_gradients(task: Task) -> None:
    run = Kept(task, TRAINING, COUNTS, None).finetuning(5, 0.0)
    found = {one.name: one for one in scores.at_end(run, task)}
    parameters = list(run.model.parameters())

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(token_loss(run.model, (x, y)), parameters)])

    rows, queries = (
        torch.stack([gradient(x[k : k + 1], y[k : k + 1]) for k in range(len(y))])
        for x, y in ((task.x, task.y), (task.xq, task.yq))
    )
    count = (task.y != IGNORED).sum(1, keepdim=True)
    expected = (count / count.sum() * (rows @ queries.T)).numpy()
    np.testing.assert_allclose(found["TracIn at the end"].values, expected, rtol=1e-3, atol=1e-6)
    assert len(found) == 3 and all(np.isfinite(one.values).all() for one in found.values())


def test_a_recorded_run_ends_where_a_plain_one_does(task: Task) -> None:
    kept = Kept(task, TRAINING, COUNTS, None)
    plain, run = kept.finetuning(5, 0.1).run(), kept.finetuning(5, 0.1)
    found = scores.recorded("f-INE", scores.Setting(), run, task)
    for one, other in zip(plain.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert found.values.shape == (20, 4) and found.loss is not None
    assert document_losses(plain, task.xq, task.yq).shape == (4,)


def test_perfect_scores_have_an_lds_and_a_slope_of_one() -> None:
    g = np.random.default_rng(0)
    influence, masks = g.normal(size=(40, 5)), (g.random((30, 40)) < 0.5).astype(float)
    truth = Truth(np.stack([-masks @ influence] * 2), g.normal(size=(50, 5)), masks, 0.0)
    found = judge([scores.Scores("perfect", influence, 1.0, influence)], truth)
    assert found["lds"] == pytest.approx(1) and found["slope_loss"] == pytest.approx(1) and "slope_sd" not in found
    assert slope(influence * 2, truth.outcome, truth) == pytest.approx(0.5)
    assert lds(-influence, truth) == pytest.approx(-1) and truth.reliability()["ceiling"] == pytest.approx(1)
