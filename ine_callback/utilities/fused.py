"""Small functions of tensors, each of which torch.compile makes a kernel or two of, on a GPU.

There every operation of its own is a launch, and reads and writes all that it works on. Elsewhere, and where nothing
can be compiled, the functions run as they are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_failures: dict[str, str] = {}


class Fused(Generic[P, R]):
    """A function that is compiled where its tensors are on a GPU; a decorator.

    It must be a function of its tensors alone: no random numbers, nothing changed in place, no branch on a value.
    Sizes are dynamic, so that a smaller last batch compiles nothing anew. Whatever fails, above all a compiler that is
    not there, is remembered, and the function runs as it is written from then on.

    Args:
        function: The function; its tensors are positional arguments.

    Example:
        >>> @Fused
        ... def product_sums(x, y):
        ...     return (x * y).sum(1)
        >>> product_sums(torch.ones(1, 3), torch.ones(1, 3))
        tensor([3.])
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function
        self._compiled: Callable[P, R] | None = None
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or self.name in _failures or not can_fuse(*args):
            return self._function(*args, **kwargs)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=True, fullgraph=True)
            return self._compiled(*args, **kwargs)
        except Exception as error:
            _failures[self.name] = f"{type(error).__name__}: {error}"
            return self._function(*args, **kwargs)

    @property
    def name(self) -> str:
        """The function's, with its module."""
        return f"{self._function.__module__}.{self._function.__qualname__}"


def can_fuse(*args: object) -> bool:
    """Whether the first tensor is on a GPU, whose work is not being captured as a CUDA graph just now."""
    first = next((x for x in args if isinstance(x, Tensor)), None)
    return first is not None and first.is_cuda and not torch.cuda.is_current_stream_capturing()


def failures() -> list[str]:
    """Sentences for the report: what could not be compiled, and ran as it is written."""
    return [f"{name} could not be compiled and ran as single operations ({why})" for name, why in _failures.items()]
