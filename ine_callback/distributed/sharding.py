"""Parameters that FSDP2 (``fully_shard``) shards over processes: whole tensors where the mathematics needs them.

A collective in which only some processes take part would mix its data with the training's. So every collective comes
right after an exchange (:mod:`ine_callback.distributed.processes`), and so does every pass through the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ine_callback.utilities.isolation import split_again, units_of


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, of which this process may hold a part. A collective where it is sharded.

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
    mine: Tensor = tensor if part is None else part()
    return mine


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are sharded over the processes."""
    return bool(units_of(module)) or any(hasattr(p, "full_tensor") for p in module.parameters())


def gradients(value: Tensor, module: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of a scalar; ``.grad`` is left as it was.

    ``torch.autograd.grad`` does not find sharded parameters in the graph. There a backward pass gathers them and
    averages the gradients over processes.
    """
    if not is_sharded(module):
        return list(torch.autograd.grad(value, parameters, allow_unused=True))
    split_again(module)  # after its forward pass the outermost unit holds other parameters than the optimizer
    before = [(p, p.grad) for p in module.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        value.backward()
        return [None if p.grad is None else whole(p.grad) for p in parameters]
    finally:
        for p, grad in before:
            p.grad = grad
