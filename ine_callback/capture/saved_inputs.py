"""Saves what a layer got until its backward pass, as autograd would: checkpoints and offloading included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from ine_callback.capture.layers.calls import Tensors


def save(inputs: Tensors) -> Callable[[], Tensors | None]:
    """Saves a call's inputs; the returned function gives them in the backward pass, or None if one was changed."""
    if isinstance(inputs, Tensor):
        return _save_one(inputs)
    saved = {name: _save_one(x) for name, x in inputs.items()}

    def load() -> dict[str, Tensor] | None:
        loaded = {name: one() for name, one in saved.items()}
        present = {name: x for name, x in loaded.items() if x is not None}
        return present if len(present) == len(loaded) else None

    return load


def _save_one(x: Tensor) -> Callable[[], Tensor | None]:
    """Saves an input; the returned function gives it in the backward pass, or None if it was changed in place.

    Under activation checkpointing or offloading a reference to the input would undo the saving of memory, so autograd
    saves it there.
    """
    x, version = x.detach(), 0 if x.is_inference() else x._version
    if not _saved_by_hooks():
        return lambda: x if x.is_inference() or x._version == version else None
    node = _SaveForBackward.apply(torch.empty(0, requires_grad=True), x)  # type: ignore[no-untyped-call]
    return lambda: node.grad_fn.saved_tensors[0]


class _SaveForBackward(torch.autograd.Function):
    """Saves an input as autograd does, so that hooks on saved tensors apply to it too."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return handle.clone()


def _saved_by_hooks() -> bool:
    """Whether hooks (of checkpointing, or offloading) apply to what autograd saves now."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return top(False) is not None
    try:  # torch 2.6 and 2.7 have no such function, but refuse to disable hooks that are in use
        with disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True
