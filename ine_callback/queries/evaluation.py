"""Values and gradients of bound queries at the present weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.data.batches import lent
from ine_callback.distributed import sharding
from ine_callback.errors import QueryError
from ine_callback.queries.bound import Batch, BoundQuery


def gradients(
    queries: Iterable[BoundQuery],
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    device: Callable[[Batch], Batch],
) -> list[Tensor]:
    """Gradients of all queries at the present weights.

    Args:
        queries: Q bound queries.
        module: The model, already isolated and in evaluation mode.
        parameters: Parameters p.
        device: Moves a batch to the module's device.

    Returns:
        For every parameter the gradients [Q, *p.shape], in float32 or better.

    Raises:
        QueryError: If a query's value is no scalar or has no gradient.
    """
    queries = list(queries)
    out = [
        torch.zeros(len(queries), *p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for p in parameters
    ]
    for k, query in enumerate(queries):
        for weight, batch in query.batches:
            value = scalar(query.value(module, device(lent(batch))), query)
            grads = sharding.gradients(value * weight, module, parameters)
            for total, grad in zip(out, grads, strict=True):
                if grad is not None:
                    total[k] += grad.to_dense() if grad.is_sparse else grad
    return out


def values(queries: Iterable[BoundQuery], module: nn.Module, device: Callable[[Batch], Batch]) -> Tensor:
    """Values [Q] of all queries at the present weights, in float32 or better; see :func:`gradients`."""
    found = []
    for query in queries:
        each = [
            (weight, scalar(query.value(module, device(lent(batch))), query).detach())
            for weight, batch in query.batches
        ]
        wide = [weight * value.to(torch.promote_types(value.dtype, torch.float32)) for weight, value in each]
        found.append(torch.stack(wide).sum())
    return torch.stack(found)


def scalar(value: Any, query: BoundQuery) -> Tensor:
    """The value as a scalar with a gradient, or a QueryError that says what is wrong."""
    name = query.info.name
    if not (isinstance(value, Tensor) and value.numel() == 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise QueryError(f"Query '{name}': its value is {got}, not a scalar tensor; return a mean over the batch.")
    if not value.requires_grad:
        raise QueryError(
            f"Query '{name}': its value has no gradient; remove no_grad/detach/.item() from the step that computes it, "
            "or return a loss from training_step."
        )
    return value.reshape(())
