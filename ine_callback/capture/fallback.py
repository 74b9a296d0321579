"""Per-row gradients of parameters that no layer function covers, one backward pass a row: exact, slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.batches import cut
from ine_callback.isolation import isolated


def row_gradients(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    rows: int,
    parameters: Sequence[nn.Parameter],
) -> list[Tensor]:
    """Gradients of every row's own loss, at the present weights.

    Runs in evaluation mode, so dropout is off and BatchNorm uses its running statistics: exact for models without them.

    Args:
        module: The model.
        loss: Mean loss of a batch.
        batch: The batch of ``rows`` rows.
        rows: b.
        parameters: The parameters to differentiate by.

    Returns:
        For each parameter the gradients [b, *shape].
    """
    out = [p.new_zeros(rows, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    with isolated(module):
        for k in range(rows):
            value = loss(module, cut(batch, torch.tensor([k]), rows))
            for total, grad in zip(out, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                if grad is not None:
                    total[k] = grad.to_dense() if grad.is_sparse else grad
    return out
