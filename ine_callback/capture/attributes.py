"""Parameters, buffers and attributes of a module, read without running its code.

A property, a parametrization or ``__getattr__`` may compute. Reading ``module.weight`` under
``parametrizations.spectral_norm``, for example, takes a step of the power iteration and so changes the training.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ine_callback.capture.errors import LayerError

_NO_DEFAULT = object()


def _instance_dict(module: nn.Module) -> dict[str, Any]:
    attributes: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return attributes


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters, without those of its children, by name.

    Example:
        >>> list(own_parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))))
        ['bias']
    """
    return {name: p for name, p in _instance_dict(module)["_parameters"].items() if p is not None}


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The own parameters that the module's code gets by their names: no property or attribute hides them."""
    attributes, of_class = _instance_dict(module), _names_in(type(module))  # type: ignore[arg-type]  # classes can be hashed
    return {n: p for n, p in own_parameters(module).items() if n not in attributes and n not in of_class}


@lru_cache(maxsize=256)
def _names_in(kind: type[nn.Module]) -> frozenset[str]:
    """All names in a class and the classes that it is made of."""
    return frozenset(name for each in kind.__mro__ for name in vars(each))


def buffer(module: nn.Module, name: str) -> Tensor | None:
    """A buffer of the module's own, or None if it has none of this name."""
    found: Tensor | None = _instance_dict(module)["_buffers"].get(name)
    return found


def setting(module: nn.Module, name: str, default: Any = _NO_DEFAULT) -> Any:
    """A plain attribute of the module or its class.

    Raises:
        LayerError: If there is none, or code would have to run to get it, and no default is given.

    Example:
        >>> setting(nn.LayerNorm(3), "eps")
        1e-05
    """
    attributes = _instance_dict(module)
    if name in attributes:
        return attributes[name]
    found = inspect.getattr_static(type(module), name, default)
    if found is not _NO_DEFAULT and not hasattr(type(found), "__get__"):
        return found
    if default is _NO_DEFAULT:
        raise LayerError(f"its attribute '{name}' is computed, and reading it could change the training")
    return default
