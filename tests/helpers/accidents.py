"""Accidents inside the package: a method of the real class fails from some call on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Accident(Exception):
    """Nothing in the package expects it."""


@contextmanager
def accident(owner: type, name: str, after: int, here: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Lets a method fail after so many calls, in the processes where ``here`` is true."""
    method, calls = getattr(owner, name), []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) > after and here():
            raise Accident("the roof fell in")
        return method(*args, **kwargs)

    setattr(owner, name, breaks)
    try:
        yield
    finally:
        setattr(owner, name, method)
