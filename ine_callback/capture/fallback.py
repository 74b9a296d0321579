"""Per-row gradients of parameters that no layer function covers, one backward pass a row: exact, slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.row_losses import Scale, read_loss
from ine_callback.data.batches import cut
from ine_callback.utilities.isolation import isolated


def row_shares(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    rows: int,
    parameters: Sequence[nn.Parameter],
    scale: Scale,
) -> list[Tensor]:
    """Every row's share of the gradient of the batch's loss, at the present weights.

    Runs in evaluation mode, so dropout is off and BatchNorm uses its running statistics: exact for models without them.

    Args:
        module: The model.
        loss: Mean loss of a batch.
        batch: The batch of ``rows`` rows.
        rows: b.
        parameters: The parameters to differentiate by.
        scale: How the batch's loss was scaled.

    Returns:
        For each parameter the shares [b, *shape].
    """
    out = [p.new_zeros(rows, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    with isolated(module):
        for k in range(rows):
            value = loss(module, cut(batch, torch.tensor([k]), rows))
            reading = read_loss(value, 1)
            if reading is not None and not bool(reading.terms):  # every token ignored: a mean over nothing, no share
                continue
            # a row with more terms (tokens) than others has the larger share of a mean over terms
            value = value / scale.rows if reading is None else value * (reading.terms / scale.terms)
            for total, grad in zip(out, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                if grad is not None:
                    total[k] = grad.to_dense() if grad.is_sparse else grad
    return out
