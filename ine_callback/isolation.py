"""Run a module's own code on the side without leaving a trace in it: the training run is sacred."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_PLAIN = (list, dict, set, int, float, bool, str, tuple, type(None))


@contextlib.contextmanager
def isolated(module: nn.Module, training: bool = False) -> Iterator[None]:
    """Everything inside may call the module's steps; afterwards module, metrics, buffers, logs and RNG are as before.

    Modes, buffers, torchmetrics objects, the module's plain attributes (lists, dicts, counters) and the random number
    generators of Python, NumPy and torch are restored; ``self.log`` and ``self.log_dict`` do nothing meanwhile.

    Args:
        module: The model.
        training: Mode to run it in; evaluation by default.
    """
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    names, own = _plain_attributes(module)
    states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
    swapped = _swap_metrics(module)
    _mute(module)
    try:
        for m, _ in modes:
            m.training = training
        with torch.enable_grad():
            yield
    finally:
        _unmute(module)
        for parent, name, metric in swapped:
            parent._modules[name] = metric
        for m, mode in modes:
            m.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        _restore_attributes(module, names, own)
        _set_rng_states(states)


def _plain_attributes(module: nn.Module) -> tuple[set[str], dict[str, tuple[Any, Any]]]:
    """The module's own Python state: users collect outputs in lists and count steps in integers."""
    internal = nn.Module().__dict__
    own = {k: v for k, v in module.__dict__.items() if k not in internal and isinstance(v, (*_PLAIN, Tensor))}
    return set(module.__dict__), {
        k: (v, v.detach().clone() if isinstance(v, Tensor) else copy.copy(v)) for k, v in own.items()
    }


def _restore_attributes(module: nn.Module, names: set[str], own: dict[str, tuple[Any, Any]]) -> None:
    for name in set(module.__dict__) - names:
        del module.__dict__[name]
    for name, (original, before) in own.items():
        if isinstance(original, list):
            original[:] = before
        elif isinstance(original, dict | set):
            original.clear()
            original.update(before)
        elif isinstance(original, Tensor):
            with torch.no_grad():
                original.copy_(before)
        module.__dict__[name] = original


def _swap_metrics(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replaces every torchmetrics object by a copy, so that updates go nowhere."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in [m for m in module.modules() if not isinstance(m, Metric | MetricCollection)]:
        for name, child in parent._modules.items():
            if isinstance(child, Metric | MetricCollection):
                swapped.append((parent, name, child))
                parent._modules[name] = copy.deepcopy(child)
    return swapped


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""


def _mute(module: nn.Module) -> None:
    if hasattr(module, "log_dict"):
        module.__dict__["log"] = module.__dict__["log_dict"] = _nothing


def _unmute(module: nn.Module) -> None:
    module.__dict__.pop("log", None)
    module.__dict__.pop("log_dict", None)
