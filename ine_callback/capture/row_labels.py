"""Each row's class, read from the autograd graph of the training loss: no convention for batches."""

from __future__ import annotations

import torch
from torch import Tensor

from ine_callback.capture.row_losses import loss_node


def read_labels(loss: Tensor, rows: int) -> Tensor | None:
    """Classes [b] of a batch's rows.

    Args:
        loss: The scalar to be differentiated.
        rows: Number of rows b of the batch.

    Returns:
        The classes, or None where the loss has no one label a row: a regression, tokens, several labels, another form.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> read_labels(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])), rows=2)
        tensor([0, 2])
    """
    node = loss_node(loss)
    name = "" if node is None else node.name()
    if name not in ("NllLossBackward0", "BinaryCrossEntropyWithLogitsBackward0"):
        return None
    target: Tensor = node._saved_target.detach()
    if target.numel() != rows or (target.is_floating_point() and not bool(((target == 0) | (target == 1)).all())):
        return None
    return target.reshape(rows).to(torch.int64)
