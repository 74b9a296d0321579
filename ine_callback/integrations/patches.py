"""Methods of another program's objects, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replaced_method(target: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Calls ``function`` in place of an object's method; what it returns undoes that.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> greeter = Greeter()
        >>> undo = replaced_method(greeter, "greet", lambda: "hi")
        >>> greeter.greet(), undo(), greeter.greet()
        ('hi', None, 'hello')
    """
    before = {name: target.__dict__[name]} if name in target.__dict__ else {}

    def undo() -> None:
        target.__dict__.pop(name, None)
        target.__dict__.update(before)

    target.__dict__[name] = function
    return undo
