"""Classes are read from the losses that have one a row, and from no other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ine_callback.capture.row_labels import read_labels

LOGITS = torch.zeros(4, 3, requires_grad=True)
Y, BITS = torch.tensor([2, 0, -100, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (F.cross_entropy(LOGITS, Y), Y),
        (F.cross_entropy(LOGITS, Y, reduction="sum") / 7, Y),
        (F.nll_loss(LOGITS, Y, weight=torch.tensor([1.0, 2.0, 3.0])), Y),
        (F.binary_cross_entropy_with_logits(LOGITS[:, 0], BITS), BITS),
        (F.binary_cross_entropy_with_logits(LOGITS[:, :1], BITS[:, None]), BITS),
        (F.binary_cross_entropy_with_logits(LOGITS[:, 0], BITS / 2), None),  # soft
        (F.binary_cross_entropy_with_logits(LOGITS, torch.ones(4, 3)), None),  # several a row
        (F.cross_entropy(LOGITS.expand(2, 4, 3).transpose(1, 2), torch.zeros(2, 4, dtype=torch.int64)), None),  # tokens
        (F.cross_entropy(LOGITS, Y, label_smoothing=0.1), None),
        (F.mse_loss(LOGITS[:, 0], BITS), None),
        (LOGITS.sum(), None),
    ],
)
def test_labels_of_a_loss(loss: torch.Tensor, labels: torch.Tensor | None) -> None:
    found = read_labels(loss, rows=4)
    assert (found is None) == (labels is None)
    if found is not None and labels is not None:
        assert found.tolist() == labels.tolist()
