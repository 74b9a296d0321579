"""Run a module's own code on the side without leaving a trace in it: the training run is sacred."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from torchmetrics import Metric, MetricCollection

_METRICS = (Metric, MetricCollection)
_INTERNAL = frozenset(nn.Module().__dict__)
_HOOKS = frozenset(name for name in _INTERNAL if "hooks" in name)
_DEEP = 10_000  # containers longer than this (a data set kept as an attribute) are restored one level deep

_MANY = 100  # parts of a container in which generators are looked for

Restore = Callable[[], None]


@contextlib.contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Everything inside may call the module's steps; afterwards module, metrics, buffers, logs and RNG are as before.

    Modes, buffers, torchmetrics objects, the plain attributes of every submodule (lists, dicts, counters, tensors,
    arrays, generators) and the random number generators of Python, NumPy and torch are restored; ``self.log`` and
    ``self.log_dict`` do nothing meanwhile. The mode is evaluation, and gradients of single parameters can be taken,
    also through reentrant activation checkpoints.

    Args:
        module: The model.
    """
    modules = [m for m in module.modules() if not isinstance(m, _METRICS)]
    modes = [(m, m.training) for m in module.modules()]
    states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
    seen: set[int] = set()
    restores = [restore for m in modules for restore in _remember_module(m, seen)]
    swapped = _swap_metrics(modules)
    _mute(module)
    try:
        for m, _ in modes:
            m.training = False
        with torch.enable_grad(), _differentiable_checkpoints(), _uncompiled(module):
            yield
    finally:
        for parent, name, metric in swapped:
            parent._modules[name] = metric
        for m, mode in modes:
            m.training = mode
        with torch.no_grad():
            for restore in restores:
                restore()
        _set_rng_states(states)


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """:func:`isolated`, for code that is not ours: gradients, grad flags and hooks are afterwards as before, too.

    Args:
        module: The model; its parameters have no gradients meanwhile.
    """
    parameters = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    hooks = [
        (kept, dict(kept))
        for m in module.modules()
        for name, kept in vars(m).items()
        if name in _HOOKS and kept is not None
    ]
    try:
        with isolated(module):
            for p, _, _ in parameters:
                p.grad = None
            yield
    finally:
        for p, grad, requires_grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for kept, before in hooks:
            kept.clear()
            kept.update(before)


@contextlib.contextmanager
def unmoved(dataset: Any) -> Iterator[None]:
    """Rows of a data set may be read inside: random augmentation leaves no trace in the random number generators.

    Those of the process are restored, and those that the data set holds, in its transforms too.

    Args:
        dataset: Any object.
    """
    states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
    seen: set[int] = set()
    restores = [restore for generator in _generators(dataset) for restore in _remember(generator, seen)]
    try:
        yield
    finally:
        for restore in restores:
            restore()
        _set_rng_states(states)


def _generators(holder: Any) -> Iterator[Any]:
    """The random number generators that an object holds, and that what it holds holds."""
    waiting, seen = deque([holder]), {id(holder)}
    while waiting and len(seen) < _DEEP:
        value = waiting.popleft()
        if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            yield value
            continue
        own = value if isinstance(value, list | tuple | dict) else getattr(value, "__dict__", {})
        parts = islice(own.values() if isinstance(own, Mapping) else own, _MANY)
        new = [part for part in parts if id(part) not in seen and not isinstance(part, type | ModuleType)]
        seen.update(map(id, new))
        waiting.extend(new)


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Submodules that torch.compile runs: wrapped by it, compiled in place, or a LightningModule given to it."""
    return [
        m
        for m in module.modules()
        if type(m).__name__ == "OptimizedModule" or m._compiled_call_impl or getattr(m, "_compiler_ctx", None)
    ]


def _uncompiled(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Runs compiled parts as they were written: other shapes would change what is compiled for the training."""
    return torch.compiler.set_stance("force_eager") if compiled_parts(module) else contextlib.nullcontext()


@contextlib.contextmanager
def _differentiable_checkpoints() -> Iterator[None]:
    """Makes reentrant activation checkpoints the other kind: ``torch.autograd.grad`` passes a reentrant one by."""

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    before = CheckpointFunction.__dict__.get("apply")
    CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = before  # type: ignore[method-assign]


def _remember_module(module: nn.Module, seen: set[int]) -> list[Restore]:
    """How to restore a module's own attributes and buffers: first their contents, then which object each name holds."""
    own = {k: v for k, v in module.__dict__.items() if k not in _INTERNAL}
    buffers = dict(module._buffers)
    contents = [r for v in (*own.values(), *buffers.values()) for r in _remember(v, seen)]

    def rebind() -> None:
        for name in [k for k in module.__dict__ if k not in own and k not in _INTERNAL]:
            del module.__dict__[name]
        module.__dict__.update(own)
        module._buffers.clear()
        module._buffers.update(buffers)

    return [*contents, rebind]


def _remember(value: Any, seen: set[int]) -> list[Restore]:
    """How to restore the contents of a mutable value, in place; nothing for anything else."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [_tensor_restore(value)]
    if isinstance(value, np.ndarray):
        array = value.copy()
        return [lambda: np.copyto(value, array)] if value.flags.writeable else []
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return [lambda: _ignore(value.set_state(state))]
    if isinstance(value, np.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        return [lambda: setattr(value.bit_generator, "state", bits)]
    if isinstance(value, np.random.RandomState | random.Random):
        return _remember_legacy(value)
    return _remember_container(value, seen)


def _tensor_restore(value: Tensor) -> Restore:
    before, version = value.detach().clone(), value._version

    def restore() -> None:
        # An untouched tensor may be part of a live graph: leave it. BatchNorm hides its changes from the version.
        if value._version != version or not torch.equal(value, before):
            value.detach().copy_(before)

    return restore


def _ignore(result: object) -> None:
    """Makes a restoring call return nothing."""


def _remember_legacy(value: np.random.RandomState | random.Random) -> list[Restore]:
    if isinstance(value, random.Random):
        python = value.getstate()
        return [lambda: value.setstate(python)]
    legacy = value.get_state()
    return [lambda: value.set_state(legacy)]


def _remember_container(value: Any, seen: set[int]) -> list[Restore]:
    if isinstance(value, tuple):
        return [r for part in value for r in _remember(part, seen)] if len(value) <= _DEEP else []
    if not isinstance(value, list | dict | set | deque):
        return []
    before = copy.copy(value)
    parts = before.values() if isinstance(before, dict) else before
    inner = [r for part in parts for r in _remember(part, seen)] if len(value) <= _DEEP else []

    def refill() -> None:
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(before)

    return [*inner, refill]


def _swap_metrics(modules: list[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replaces every torchmetrics object by a copy, so that updates go nowhere."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in modules:
        for name, child in parent._modules.items():
            if isinstance(child, _METRICS):
                swapped.append((parent, name, child))
                parent._modules[name] = copy.deepcopy(child)
    return swapped


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""


def _mute(module: nn.Module) -> None:
    if hasattr(module, "log_dict"):
        module.__dict__["log"] = module.__dict__["log_dict"] = _nothing
