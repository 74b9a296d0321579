"""Means over a block of what an optimizer keeps of each element: they stand for an element-wise scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.distributed.sharding import whole

State = dict[str, Any]  # what an optimizer keeps of one parameter


def total(values: Tensor) -> Tensor:
    """Sum of a tensor's elements, of which this process may hold a part."""
    return whole(values.float().sum())


def steps_of(state: State) -> float:
    """Steps that were taken with a parameter; a number, a tensor on the host or on the device (fused, capturable)."""
    return float(state.get("step", 0))


def block_mean(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    unscale: Tensor | float,
    warm: Callable[[nn.Parameter, State], Tensor | float],
    cold: Callable[[nn.Parameter, Tensor], Tensor | float],
) -> Tensor | None:
    """Mean over the elements of a block; None where there is neither a state nor a gradient.

    Args:
        optimizer: The optimizer.
        parameters: The block's.
        unscale: Factor that undoes the scaling of the present gradients under mixed precision.
        warm: Sum over a parameter's elements, of the parameter and its state.
        cold: The same before its first step, of the parameter and its present gradient.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, 3.0])
        >>> mean = lambda: block_mean(sgd, [weight], 1.0, lambda p, s: s["momentum_buffer"].sum(), lambda p, g: g.sum())
        >>> sgd = torch.optim.SGD([weight], momentum=0.9)
        >>> mean()
        tensor(2.)
    """
    summed: Tensor | float = 0.0
    count = 0
    for p in parameters:
        state = optimizer.state.get(p, {})
        if state and _stepped(state):
            summed = summed + warm(p, state)
        elif p.grad is not None:
            summed = summed + cold(p, _dense(p.grad.detach()) * unscale)
        else:
            continue
        count += p.numel()
    return torch.as_tensor(summed / count) if count else None


def _stepped(state: State) -> bool:
    """Whether a step was taken: Adagrad may have a state before. A count on the device is not waited for."""
    step = state.get("step", 1)
    return bool(torch.is_tensor(step) and step.device.type != "cpu") or float(step) > 0


def _dense(grad: Tensor) -> Tensor:
    """The whole gradient; of a sparse one the elements that are there."""
    return (grad.coalesce().values() if grad.is_sparse else whole(grad)).float()
