"""Row losses: derived from the module's own step and equal to explicit ones, or refused with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.flat_module import FlatModule
from ine_callback.methods.bif.row_losses import row_losses
from ine_callback.utilities.isolation import isolated

BATCH = (torch.randn(7, 4), torch.arange(7) % 3)


class Model(L.LightningModule):
    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.loss, self.accuracy = nn.Linear(4, 3), loss, MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = self.loss(logits, y)
        self.log("accuracy", self.accuracy(logits, y))
        return loss


def regression(loss: Callable[..., Tensor], **kwargs: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: loss(logits, F.one_hot(y, 3).float(), **kwargs)


EXPLICIT: list[tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Tensor]]] = [
    (F.cross_entropy, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    (nn.CrossEntropyLoss(), lambda z, y: F.cross_entropy(z, y, reduction="none")),
    (
        lambda z, y: {"loss": F.nll_loss(z.log_softmax(1), y)},
        lambda z, y: -z.log_softmax(1).gather(1, y[:, None])[:, 0],
    ),
    (
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1, reduction="none"),
    ),
    (regression(F.mse_loss), lambda z, y: (z - F.one_hot(y, 3)).square().mean(1)),
    (regression(F.l1_loss), lambda z, y: (z - F.one_hot(y, 3)).abs().mean(1)),
    (regression(nn.SmoothL1Loss()), lambda z, y: F.smooth_l1_loss(z, F.one_hot(y, 3), reduction="none").mean(1)),
    (regression(F.huber_loss, delta=0.3), lambda z, y: F.huber_loss(z, F.one_hot(y, 3), "none", 0.3).mean(1)),
    (
        regression(nn.BCEWithLogitsLoss()),
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).float(), reduction="none").mean(1),
    ),
    (
        lambda z, y: F.binary_cross_entropy(z.sigmoid(), F.one_hot(y, 3).float()),
        lambda z, y: F.binary_cross_entropy(z.sigmoid(), F.one_hot(y, 3).float(), reduction="none").mean(1),
    ),
    (  # a logged auxiliary loss that is no part of what is returned
        lambda z, y: (F.mse_loss(z, z.detach() + 1), F.cross_entropy(z, y))[1],
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
    ),
]


@pytest.mark.parametrize(("loss", "explicit"), EXPLICIT)
def test_derived_losses_are_the_explicit_ones(loss: Any, explicit: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Model(loss)
    with isolated(model):
        losses = row_losses(model, BATCH)
        rows = losses.rows(model, BATCH)
        assert torch.allclose(losses(model, rows), explicit(model.net(BATCH[0]), BATCH[1]), atol=1e-6)
        flat = FlatModule(model)  # metrics in the step do not get in the way of running chains together
        many = flat.values(flat.weights + torch.randn(3, len(flat.weights)), losses, rows)
        assert many.shape == (3, 7) and not flat.notes


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda z, y: F.cross_entropy(z, y) + z.square().mean(), "mean of none of its 1 standard losses"),
        (lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(), "without a standard loss"),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum"), "mean of none"),
        (lambda z, y: None, "returned no loss"),
    ],
)
def test_other_losses_are_refused_with_a_remedy(loss: Any, why: str) -> None:
    model = Model(loss)
    with isolated(model), pytest.raises(InfluenceError, match=f"{why}.*loss_fn=.*influence_loss"):
        row_losses(model, BATCH)


def test_an_explicit_loss_comes_first_and_is_checked() -> None:
    model = Model(F.cross_entropy)
    model.influence_loss = lambda batch: torch.ones(len(batch[1]))  # type: ignore[assignment]
    ones = row_losses(model, BATCH)
    assert ones(model, ones.rows(model, BATCH)).tolist() == [1.0] * 7
    twos = row_losses(model, BATCH, lambda module, batch: torch.full((len(batch[1]),), 2.0))
    assert twos(model, twos.rows(model, BATCH)).tolist() == [2.0] * 7
    with pytest.raises(InfluenceError, match=r"loss_fn returned \(\) for a batch of 7 rows; return losses \[7\]"):
        row_losses(model, BATCH, lambda module, batch: torch.tensor(2.0))


def test_a_plain_module_must_be_told() -> None:
    with pytest.raises(InfluenceError, match="Linear has no training_step"):
        row_losses(nn.Linear(4, 3), BATCH)


def test_the_step_is_left_at_its_loss() -> None:
    seen = []

    class Talks(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            seen.append("after the loss")
            return loss

    model = Talks(F.cross_entropy)
    with isolated(model):
        losses = row_losses(model, BATCH)
        rows = losses.rows(model, BATCH)
        seen.clear()
        losses(model, rows)
    assert not seen
