"""Types and checks of single options."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from ine_callback.errors import InfluenceError

OnError = Literal["warn", "raise"]
Uncaptured = Literal["warn", "fallback", "raise"]
InitialWeights = Literal["random", "fixed"]


def check_count(owner: str, name: str, value: object) -> None:
    """Checks an option that is an integer of at least 1.

    Args:
        owner: Class named in messages.
        name: The option.
        value: Its value.

    Raises:
        InfluenceError: Naming the option and its value.
    """
    if not isinstance(value, int) or value < 1:
        raise InfluenceError(f"{owner}: {name}={value!r} must be an integer of at least 1.")


def checked_layers(layers: Sequence[str] | None, module: nn.Module, owner: str) -> Sequence[str] | None:
    """The patterns of modules' names, each of which must fit one.

    Raises:
        InfluenceError: For a pattern that fits none, with some names that there are.
    """
    if layers is None:
        return None
    names = [name for name, child in module.named_modules() if any(True for _ in child.parameters(recurse=False))]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    lost = [one for one in patterns if not any(fnmatchcase(name, one) for name in names)]
    if lost or not patterns:
        raise InfluenceError(
            f"{owner}: layers={patterns!r}: {lost[0] if lost else 'nothing'!r} fits no module with parameters of its "
            f"own; there are {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
        )
    return patterns
