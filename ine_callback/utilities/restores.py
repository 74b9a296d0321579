"""How single values are put back in place: random number generators, tensors, arrays."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

Restore = Callable[[], None]


def generator_restore(value: Any) -> Restore | None:
    """How to restore a random number generator; None for anything else."""
    kind = type(value)
    if issubclass(kind, torch.Generator):
        state = value.get_state()
        return lambda: _ignore(value.set_state(state))
    if issubclass(kind, np.random.Generator):
        return generator_restore(value.bit_generator)
    if issubclass(kind, np.random.BitGenerator):
        bits = copy.deepcopy(value.state)
        return lambda: setattr(value, "state", bits)
    if issubclass(kind, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):
        python = value.getstate()
        return lambda: value.setstate(python)
    return None


def _ignore(result: object) -> None:
    """Makes a restoring call return nothing."""


def array_restore(value: Any) -> Restore:
    """How to put an array's contents back."""
    before = np.array(value, subok=False)
    return lambda: np.copyto(value, before)


def is_plain(value: Tensor) -> bool:
    """Whether its elements lie in memory one by one; a sparse tensor's cannot be put back in place."""
    return value.layout is torch.strided and not value.is_quantized and not value.is_nested


def tensor_restore(value: Tensor) -> Restore:
    """How to put a leaf's contents back in place, for others may hold it or share its memory."""
    data, learns, version = value.data, value.requires_grad, value._version
    cells = _distinct(data)
    before, keep = cells.clone(), _unsafe_preserve_version_counter(value)

    def restore() -> None:
        if value.grad_fn is not None:  # written to in place by what requires a gradient
            value.detach_()
        if value.requires_grad != learns:
            value.requires_grad_(learns)
        if value.data_ptr() != data.data_ptr() or value.shape != data.shape:
            value.data = data
        # BatchNorm hides its changes from the version, and so does `.data`.
        if value._version != version or not torch.equal(cells, before):
            cells.copy_(before)
            keep.__exit__()  # a live graph may have saved it, and finds the contents as they were

    return restore


def _distinct(data: Tensor) -> Tensor:
    """The elements of an expanded tensor, each once: no other form of it can be written to."""
    for d, (stride, size) in enumerate(zip(data.stride(), data.shape, strict=True)):
        if not stride and size > 1:
            data = data.narrow(d, 0, 1)
    return data


def untouched(value: Tensor) -> Restore:
    """Raises at the end if a parameter that was not copied was written to."""
    version = value._version

    def check() -> None:
        if value._version != version:
            raise RuntimeError(
                f"a step writes to a frozen parameter of shape {tuple(value.shape)}, and there are too many of them to "
                "be put back: pass a callable query (module, batch) -> scalar that leaves them alone"
            )

    return check
