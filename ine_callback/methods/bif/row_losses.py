"""Finds each row's loss as a differentiable function of the weights: from the user, or from the module's step.

:mod:`ine_callback.capture.row_losses` reads losses off the autograd graph of a training step. Chains need more: the
losses as a function of many weights at once, and the weight of each row in the training's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.rows import REMEDY, Batch, RowLosses
from ine_callback.methods.bif.step_loss import derive
from ine_callback.methods.bif.user_loss import RowLoss, UserRowLosses

__all__ = ["RowLoss", "row_losses"]


def row_losses(
    module: nn.Module,
    batch: Batch,
    loss_fn: RowLoss | None = None,
    owner: str = "BIF",
    steps: Sequence[str] = ("training_step", "validation_step"),
    count: int | None = None,
) -> RowLosses:
    """Finds out how to get each row's loss, and verifies it on some rows of a batch.

    First choice is ``loss_fn``, then the module's ``influence_loss(batch)``; else the terms of the standard
    loss inside the module's ``training_step`` (or ``validation_step``). A row's loss is the mean of its own terms; its
    weight (by its tokens, its class, a mask) is that in the step's loss.

    Args:
        module: The model, isolated and in evaluation mode (:func:`ine_callback.utilities.isolation.isolated`).
        batch: At least one row, on the module's device.
        loss_fn: ``(module, batch) -> losses [b]``, or [b, T] for rows of T terms, whose mean is the row's loss.
        owner: Class named in messages.
        steps: Steps to search for a loss, best first.
        count: Rows of the batch, where known.

    Raises:
        InfluenceError: If none of the three works; the message says what to pass.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self(batch[0]), batch[1])
        >>> model, batch = Model(3, 1), (torch.randn(4, 3), torch.randn(4, 1))
        >>> losses = row_losses(model, batch)
        >>> losses(model, losses.rows(model, batch)).shape
        torch.Size([4])
    """
    if loss_fn is not None or hasattr(module, "influence_loss"):
        function, name = (_influence_loss, "influence_loss") if loss_fn is None else (loss_fn, "loss_fn")
        losses = UserRowLosses(function, name, owner)
        losses.verify(module, batch, count)
        return losses
    reasons = []
    for name in steps:
        if name == "training_step" and not getattr(module, "automatic_optimization", True):
            reasons.append("training_step optimizes by hand")
            continue
        if not callable(getattr(module, name, None)):
            continue
        found = derive(module, name, batch, count)
        if not isinstance(found, str):
            return found
        reasons.append(f"{name} {found}")
    why = "; ".join(reasons) or f"{type(module).__name__} has no training_step"
    raise InfluenceError(f"{owner}: the losses of single rows are unknown ({why}); {REMEDY}.")


def _influence_loss(module: Any, batch: Batch) -> Tensor:
    losses: Tensor = module.influence_loss(batch)
    return losses
