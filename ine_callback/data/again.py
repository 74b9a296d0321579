"""Calls a user's function once more as if for the first time, and leaves everything as the first call left it."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from ine_callback.utilities.restores import Restore, array_restore, generator_restore

_MAX_OBJECTS = 500  # objects followed: a function may reach a whole data set
_MAX_LENGTH = 10_000  # elements of a container or array that is remembered
_NO_HOLDERS = (int, float, str, bytes, type(None), type, ModuleType, Tensor, nn.Module)


class Again:
    """What a function's next call may depend on and change: random states, and the attributes that it reaches.

    Args:
        function: A function, method, partial or callable object.

    Example:
        >>> import random
        >>> again = Again(random.random)
        >>> back = again.remember()
        >>> first = random.random()
        >>> back()
        >>> first == random.random()
        True
    """

    def __init__(self, function: Any) -> None:
        self._generators: list[Any] = []
        self._spaces: list[dict[str, Any]] = []
        self._cells: list[CellType] = []
        self._globals: list[tuple[dict[str, Any], str]] = []
        waiting: deque[Any] = deque([*_methods(function)] if isinstance(function, type) else [function])
        seen = {id(each) for each in waiting}
        while waiting and len(seen) < _MAX_OBJECTS:
            for part in self._reached(waiting.popleft()):
                if id(part) not in seen and not isinstance(part, _NO_HOLDERS):
                    seen.add(id(part))
                    waiting.append(part)

    def remember(self) -> Restore:
        """Returns what brings the present state back."""
        states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
        restores = [back for each in self._generators if (back := generator_restore(each)) is not None]
        restores += [_namespace(space) for space in self._spaces]
        restores += [_cell(cell) for cell in self._cells]
        restores += [_global(space, name) for space, name in self._globals]

        def restore() -> None:
            for each in restores:
                each()
            _set_rng_states(states)

        return restore

    def _reached(self, value: Any) -> Iterator[Any]:
        """What a value holds; notes what of it can change."""
        if generator_restore(value) is not None:
            self._generators.append(value)
        elif isinstance(value, functools.partial):
            yield from (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            yield from (value.__self__, value.__func__)
        elif isinstance(value, FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, list | tuple | dict):
            yield from list(value.values() if isinstance(value, dict) else value)[:100]
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._spaces.append(value.__dict__)
            yield from list(value.__dict__.values())
            yield from _methods(type(value))

    def _of_function(self, function: FunctionType) -> Iterator[Any]:
        if function.__module__.partition(".")[0] in ("torch", "numpy", "random"):
            return
        for cell in function.__closure__ or ():
            self._cells.append(cell)
            yield from _contents(cell)
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for name in _names(function.__code__):
            if name in function.__globals__:
                self._globals.append((function.__globals__, name))
                yield function.__globals__[name]


def _ignore(result: object) -> None:
    """Makes a restoring call return nothing."""


def _names(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *(name for each in inner for name in _names(each))}


def _methods(kind: type) -> Iterator[FunctionType]:
    return (value for base in kind.__mro__ for value in vars(base).values() if isinstance(value, FunctionType))


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # still empty
        return []


def _namespace(space: dict[str, Any]) -> Restore:
    before, inner = dict(space), [_container(value) for value in space.values()]

    def restore() -> None:
        if space.keys() != before.keys() or any(space[name] is not before[name] for name in before):
            space.clear()
            space.update(before)
        for each in inner:
            each()

    return restore


def _cell(cell: CellType) -> Restore:
    contents = _contents(cell)
    inner = [_container(value) for value in contents]

    def restore() -> None:
        for value in contents:
            if not _contents(cell) or cell.cell_contents is not value:
                cell.cell_contents = value
        for each in inner:
            each()

    return restore


def _global(space: dict[str, Any], name: str) -> Restore:
    value = space.get(name)
    inner = _container(value)

    def restore() -> None:
        if space.get(name) is not value:
            space[name] = value
        inner()

    return restore


def _container(value: Any) -> Restore:
    """How to restore what a list, dictionary, set, array or tensor holds; of anything else nothing."""
    if isinstance(value, list | dict | set | deque) and len(value) <= _MAX_LENGTH:
        before = copy.copy(value)

        def refill() -> None:
            if _parts(value) != _parts(before):
                value.clear()
                (value.extend if isinstance(value, list | deque) else value.update)(before)

        return refill
    if isinstance(value, np.ndarray) and value.size <= _MAX_LENGTH and value.flags.writeable:
        return array_restore(value)
    if isinstance(value, Tensor) and value.numel() <= _MAX_LENGTH and not value.requires_grad:
        tensor, version = value.clone(), value._version
        return lambda: _ignore(None if value._version == version else value.copy_(tensor))
    return lambda: None


def _parts(container: Any) -> list[Any]:
    """By identity: parts may define their own comparison."""
    return (
        [(key, id(value)) for key, value in container.items()] if isinstance(container, dict) else [*map(id, container)]
    )
