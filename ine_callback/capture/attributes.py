"""What a module holds, read without running its code: a property, a parametrization or ``__getattr__`` may compute.

Reading ``module.weight`` under ``parametrizations.spectral_norm`` is a step of the power iteration; a training in which
we do it is another training.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

_NONE = object()


class LayerError(ValueError):
    """One layer cannot be recorded; the message says why, after the layer's name."""


def _held(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters by their names.

    Example:
        >>> list(own_parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))))
        ['bias']
    """
    return {name: p for name, p in _held(module)["_parameters"].items() if p is not None}


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that the module's code finds under their names: nothing computed (a property) stands before them."""
    held, kinds = _held(module), type(module).__mro__
    return {
        name: p
        for name, p in own_parameters(module).items()
        if name not in held and not any(name in vars(kind) for kind in kinds)
    }


def buffer(module: nn.Module, name: str) -> Tensor | None:
    """One of the module's own buffers, None where it has none of this name."""
    found: Tensor | None = _held(module)["_buffers"].get(name)
    return found


def setting(module: nn.Module, name: str, default: Any = _NONE) -> Any:
    """A plain attribute of the module or its class.

    Raises:
        LayerError: If there is none (without a default), or code would have to run for it.

    Example:
        >>> setting(nn.LayerNorm(3), "eps")
        1e-05
    """
    held = _held(module)
    if name in held:
        return held[name]
    found = inspect.getattr_static(type(module), name, default)
    if found is not _NONE and not hasattr(type(found), "__get__"):
        return found
    if default is _NONE:
        raise LayerError(f"its attribute '{name}' is computed, and reading it could change the training")
    return default
