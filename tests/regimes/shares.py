"""Single rows' shares of a batch's gradient: from a pass of the row alone, or among its batch-mates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .regime import Classifier

Shares = list[dict[nn.Parameter, Tensor]]


def gradient(module: nn.Module, loss: Tensor) -> dict[nn.Parameter, Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {p: g.detach().to_dense() for p, g in zip(parameters, found, strict=True) if g is not None}


def alone(module: Classifier, loss: Callable[[Any], Tensor], singles: list[Any], coefficients: list[float]) -> Shares:
    """Each row's gradient from a pass of its own, times its part of the batch's loss."""
    return [
        {p: g * c for p, g in gradient(module, loss(single)).items()}
        for single, c in zip(singles, coefficients, strict=True)
    ]


def among(
    module: Classifier,
    loss: Callable[[Any], Tensor],
    batch: Any,
    rows: int,
    random: Tensor | None,
    accumulate: int,
) -> Shares:
    """Each row's share from passes of the whole batch in which only that row's use of the weights has a gradient."""
    assert random is not None
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    shares = []
    for k in range(rows):
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        torch.set_rng_state(random)
        with _only(module, k):
            shares.append({p: g / accumulate for p, g in gradient(module, loss(batch)).items()})
    return shares


@contextmanager
def _only(module: nn.Module, row: int) -> Iterator[None]:
    """Every layer's output of the other rows comes from weights without a gradient."""
    handles = []
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            handles += _mask_recurrent(child, row)
        elif list(child.parameters(recurse=False)):
            hook: Callable[..., Tensor] = _mask(row)
            handles.append(child.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask_recurrent(module: nn.RNNBase, row: int) -> list[Any]:
    """Its states of the other rows come from weights without a gradient, with the same dropout inside."""
    before: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        if len(before) > 1:
            return output
        after = torch.get_rng_state()
        torch.set_rng_state(before[0])
        before.append(after)
        other, _ = functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, args)
        before.clear()
        torch.set_rng_state(after)
        mine = (torch.arange(len(other)) == row).view(-1, 1, 1)
        return torch.where(mine, output[0], other), output[1]

    save = module.register_forward_pre_hook(lambda *_: None if before else before.append(torch.get_rng_state()))
    return [save, module.register_forward_hook(hook)]


def _mask(row: int) -> Callable[..., Tensor]:
    inside = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if inside or not isinstance(output, Tensor):
            return output
        inside.append(1)
        frozen = {name: p.detach() for name, p in module.named_parameters()}
        buffers = {name: b.clone() for name, b in module.named_buffers()}  # running statistics move once a batch
        other = functional_call(module, {**frozen, **buffers}, args, kwargs)
        inside.pop()
        mine = torch.zeros(len(output), dtype=torch.bool)
        mine[row] = True
        return torch.where(mine.view(-1, *[1] * (output.dim() - 1)), output, other)

    return hook
