"""Parameters that FSDP2 (``fully_shard``) splits over processes: whole tensors where the mathematics needs them.

A collective that only some processes take part in would mix its data with those of the training. So every one comes
right after a meeting (:mod:`ine_callback.distributed.processes`), and so does every pass through the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of which this process may hold a part.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    gather = getattr(tensor, "full_tensor", None)  # only torch's DTensor has it; importing that takes a second
    full: Tensor = tensor if gather is None else gather()
    return full


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; no collective."""
    part = getattr(tensor, "to_local", None)
    own: Tensor = tensor if part is None else part()
    return own


def is_sharded(module: nn.Module) -> bool:
    """Whether the processes share the parameters among them."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def gradients(value: Tensor, module: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of a scalar, with ``.grad`` left as it was.

    Where parameters are split, ``torch.autograd.grad`` finds none of them in the graph: a backward pass puts them
    together and averages the gradients over processes.
    """
    if not is_sharded(module):
        return list(torch.autograd.grad(value, parameters, allow_unused=True))
    kept = [(p, p.grad) for p in module.parameters()]
    for p, _ in kept:
        p.grad = None
    try:
        value.backward()
        return [None if p.grad is None else whole(p.grad) for p in parameters]
    finally:
        for p, grad in kept:
            p.grad = grad
