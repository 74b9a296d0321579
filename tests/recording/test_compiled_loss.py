"""Losses that compiled code computes: the same row losses, margins and scores as of the model as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.scores import Scores

ROWS, BATCH, FEATURES, CLASSES, TOKENS = 12, 4, 5, 3, 4
Form = Callable[[Tensor, Tensor], Tensor]


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, torch.tensor([1.0, 2.0, 0.5]))


def ignoring(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.masked_fill(labels == 2, -100), reduction="sum") / 3


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != 1).float()
    return (F.cross_entropy(logits, labels, reduction="none") * mask).sum() / 2


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits, F.one_hot(labels, CLASSES).float())


def binary(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], (labels == 1).float(), pos_weight=torch.tensor(2.0))


def by_token(logits: Tensor, labels: Tensor) -> Tensor:
    each = torch.stack([logits + k for k in range(TOKENS)], 1) * torch.arange(1, TOKENS + 1)[:, None]
    return F.cross_entropy(each.flatten(0, 1), labels.repeat_interleave(TOKENS))


def smooth(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def of_two(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + 0.1 * F.mse_loss(logits, torch.zeros_like(logits))


class WithLoss(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.form(self.net(x), labels)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def recorded(form: Form, options: dict[str, Any] | None) -> tuple[Scores, list[str], np.ndarray | None]:
    torch.manual_seed(0)
    module = WithLoss(form)
    run = module if options is None else torch.compile(module, **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, y = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return 0.5 * model(*batch)

    queries = {"q": (x[:4] + 1, y[:4])}
    recorder = Recorder(run, optimizer, ROWS, queries=queries, loss=loss, total_steps=6, on_error="raise")
    with recorder:
        for _ in range(2):
            for rows in torch.arange(ROWS).split(BATCH):
                batch = x[rows], y[rows]
                recorder.start_batch(rows, batch)
                value = loss(run, batch)
                recorder.see(value)
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
    report = recorder.report()
    return report.scores, report.run.notes, report.scores.margins


LONG = [pytest.param(form, marks=pytest.mark.long) for form in (weighted, ignoring, squared, binary)]


@pytest.mark.parametrize("form", [F.cross_entropy, masked, by_token, *LONG])
def test_row_losses_margins_and_scores_are_those_of_eager_code(form: Form) -> None:
    eager, _, margins = recorded(form, None)
    scores, notes, told = recorded(form, {"backend": "eager", "fullgraph": True})
    np.testing.assert_allclose(scores.mean_loss, eager.mean_loss, rtol=1e-5)
    np.testing.assert_allclose(scores.mu, eager.mu, rtol=1e-4, atol=1e-6)
    assert (told is None) == (margins is None)
    if told is not None and margins is not None:
        np.testing.assert_allclose(told, margins, rtol=1e-4, atol=1e-6)
    assert not any("standard form" in note for note in notes)


@pytest.mark.parametrize("form", [smooth, of_two])
def test_other_forms_are_not_guessed(form: Form) -> None:
    scores, notes, _ = recorded(form, {"backend": "eager", "fullgraph": True})
    assert np.isnan(scores.mean_loss).all()
    assert any("standard form" in note for note in notes)


@pytest.mark.long
def test_training_is_the_same() -> None:
    def trained(record: bool) -> list[Tensor]:
        torch.manual_seed(0)
        torch.compiler.reset()
        module = WithLoss(F.cross_entropy)
        run, x, y = torch.compile(module, fullgraph=True), torch.randn(ROWS, FEATURES), torch.randint(3, (ROWS,))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        recorder = Recorder(run, optimizer, ROWS, loss=lambda model, batch: model(*batch), total_steps=3)
        if record:
            recorder.start()
        for rows in torch.arange(ROWS).split(BATCH):
            if record:
                recorder.start_batch(rows, (x[rows], y[rows]))
            run(x[rows], y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        recorder.stop()
        return [p.detach() for p in module.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))
