"""Runs a module's steps on the side without leaving a trace in it: training goes on bit-identically."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from ine_callback.utilities.held import attributes
from ine_callback.utilities.remember import MAX_LENGTH, Memory
from ine_callback.utilities.restores import Restore

_MAX_PARTS = 100  # parts of a container that are searched for generators


@contextlib.contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Everything inside may call the module's steps; afterwards module, metrics, buffers, logs and RNG are as before.

    Modes, parameters, buffers, torchmetrics objects, the attributes of every submodule and of plain objects among them
    (lists, dicts, counters, tensors, arrays, generators) and the random number generators of Python, NumPy and torch
    are restored, and so is what the user's code reaches beside the module: closures, globals, callbacks, the data
    module, schedulers (:mod:`ine_callback.utilities.reached`). ``self.log``, ``self.log_dict`` and the trainer's
    loggers do nothing meanwhile. The mode is evaluation, and gradients of
    single parameters can be taken, also through reentrant activation checkpoints.

    Tensors that are part of a live graph (a hidden state, a metric's sum of losses) are lent as detached copies: the
    objects themselves are never written to. An iterator cannot be reset, so taking from one fails inside. All is
    registered for restoration before the first change.

    Args:
        module: The model.

    Raises:
        RuntimeError: If something the module holds cannot be remembered; nothing was changed then.
    """
    with _restoring() as register:
        states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
        register(lambda: _set_rng_states(states))
        split_again(module)
        memory = Memory(register)
        memory.take(module)
        modules = list(module.modules())
        for m in modules:
            if "training" not in m.__dict__:  # a scripted module keeps its mode elsewhere
                register(lambda m=m, mode=m.training: setattr(m, "training", mode))  # type: ignore[misc]
        memory.lend()
        for m in modules:
            _evaluate(m)
            _mute(m)
        register(lambda: split_again(module))
        with torch.enable_grad(), _differentiable_checkpoints(), _uncompiled(module), _uncached():
            yield


@contextlib.contextmanager
def unmoved(dataset: Any) -> Iterator[None]:
    """Rows of a data set may be read inside: random augmentation leaves no trace in the random number generators.

    Those of the process are restored, and those that the data set holds, in its transforms too.

    Args:
        dataset: Any object.
    """
    with _restoring() as register:
        states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
        register(lambda: _set_rng_states(states))
        Memory(register).take(*_generators(dataset))
        yield


def units_of(module: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 has made units; asked of their classes, for attributes of a module may be its own code."""
    return [m for m in module.modules() if hasattr(type(m), "reshard") and hasattr(type(m), "unshard")]


def split_again(module: nn.Module) -> None:
    """Lets FSDP2 hold parts of the parameters only: its outermost unit keeps them whole after a forward pass.

    Whole ones are other objects, and stay as they are when the optimizer steps.
    """
    for part in units_of(module):
        part.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def _restoring() -> Iterator[Callable[[Restore], None]]:
    """Takes what is to be done in the end: the last first, all of it whatever fails, then the first error is raised."""
    restores: list[Restore] = []
    try:
        yield restores.append
    except BaseException:
        _restore(restores)
        raise
    for error in _restore(restores):
        raise error


def _restore(restores: list[Restore]) -> list[BaseException]:
    errors: list[BaseException] = []
    with torch.no_grad():
        for restore in reversed(restores):
            try:
                restore()
            except BaseException as error:  # also Ctrl-C: the rest must be put back all the same
                errors.append(error)
    restores.clear()  # they hold a copy of the weights
    return errors


def _generators(holder: Any) -> Iterator[Any]:
    """The random number generators that an object holds, and that what it holds holds."""
    waiting, seen = deque([holder]), {id(holder)}
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    while waiting and len(seen) < MAX_LENGTH:
        value = waiting.popleft()
        kind = type(value)
        if issubclass(kind, kinds):
            yield value
            continue
        if issubclass(kind, dict):
            held: Any = dict.values(value)
        elif issubclass(kind, list | tuple):
            held = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
        else:
            held = (attributes(value) or {}).values()
        new = [part for part in islice(held, _MAX_PARTS) if id(part) not in seen and not _is_code(part)]
        seen.update(map(id, new))
        waiting.extend(new)


def random_state(holder: Any) -> list[object]:
    """States of the process's random number generators, and of those that an object holds, to be compared."""
    held = [_state_of(one) for one in _generators(holder) if not isinstance(one, random.SystemRandom)]
    cuda = [bytes(torch.cuda.get_rng_state().cpu().numpy())] if torch.cuda.is_initialized() else []
    legacy: Any = np.random.get_state()
    return [bytes(torch.get_rng_state().numpy()), *cuda, bytes(legacy[1]), legacy[2:], random.getstate(), *held]


def _state_of(generator: Any) -> object:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().cpu().numpy())
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state(legacy=False) if hasattr(generator, "get_state") else generator.getstate())


def _is_code(part: object) -> bool:
    return issubclass(type(part), type | ModuleType)


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Submodules that torch.compile runs: wrapped by it, compiled in place, or a LightningModule given to it."""
    return [
        m
        for m in module.modules()
        if type(m).__name__ == "OptimizedModule"
        or m.__dict__.get("_compiled_call_impl")
        or m.__dict__.get("_compiler_ctx")
    ]


def _uncompiled(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Runs compiled code as it was written: other shapes would change what is compiled for the training."""
    compiles = "torch._dynamo" in sys.modules  # a function may be compiled, too, where no module tells
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Sets aside what ``parametrize.cached`` holds: training and the step beside it must not share cached weights."""
    before = parametrize._cache, parametrize._cache_enabled
    parametrize._cache, parametrize._cache_enabled = {}, 0
    try:
        yield
    finally:
        parametrize._cache, parametrize._cache_enabled = before


@contextlib.contextmanager
def _differentiable_checkpoints() -> Iterator[None]:
    """Makes reentrant activation checkpoints the other kind: ``torch.autograd.grad`` passes a reentrant one by."""

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    before = CheckpointFunction.__dict__.get("apply")
    try:
        CheckpointFunction.apply = apply  # type: ignore[method-assign]
        yield
    finally:
        if before is not None:
            CheckpointFunction.apply = before  # type: ignore[method-assign]
        elif "apply" in CheckpointFunction.__dict__:
            del CheckpointFunction.apply


def _evaluate(module: nn.Module) -> None:
    if type(module) in (nn.LSTM, nn.GRU, nn.RNN) and (module.num_layers == 1 or not module.dropout):
        return  # without dropout both modes are the same, and cuDNN differentiates in training mode alone
    if "training" in module.__dict__:
        module.__dict__["training"] = False  # past a __setattr__ of the user's
    else:
        module.training = False


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""


def _mute(module: nn.Module) -> None:
    trainer = module.__dict__.get("_trainer")
    if issubclass(type(trainer), Trainer):  # of FSDP's and Fabric's stand-ins nothing is known
        trainer.__dict__["_loggers"] = [DummyLogger() for _ in trainer.__dict__["_loggers"]]
    if "log_dict" in module.__dict__ or any("log_dict" in parent.__dict__ for parent in type(module).__mro__):
        module.__dict__["log"] = module.__dict__["log_dict"] = _nothing
