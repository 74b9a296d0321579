"""Options that callback and recorder share, with the one check of them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from ine_callback.errors import InfluenceError

OnError = Literal["warn", "raise"]
Uncaptured = Literal["warn", "fallback", "raise"]
InitialWeights = Literal["random", "fixed"]


def check_options(
    owner: str, on_error: OnError, uncaptured: Uncaptured, initial_weights: InitialWeights, **counts: int
) -> None:
    """Checks options before anything is built from them.

    Args:
        owner: Class named in messages.
        on_error: What to do about an error of ours.
        uncaptured: What to do about parameters without a capture.
        initial_weights: Whether another run would start from other weights.
        counts: Options that are integers of at least 1, by name.

    Raises:
        InfluenceError: Naming the option, its value and what it may be.

    Example:
        >>> check_options("Recorder", "warn", "raise", "random", refresh_every=0)
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: Recorder: refresh_every=0 must be an integer of at least 1.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InfluenceError(f"{owner}: {name}={value!r} must be an integer of at least 1.")
    if on_error not in get_args(OnError):
        raise InfluenceError(f"{owner}: on_error={on_error!r} is unknown; pass 'warn' or 'raise'.")
    if uncaptured not in get_args(Uncaptured):
        raise InfluenceError(f"{owner}: uncaptured={uncaptured!r} is unknown; pass 'warn', 'fallback' or 'raise'.")
    if initial_weights not in get_args(InitialWeights):
        raise InfluenceError(
            f"{owner}: initial_weights={initial_weights!r} is unknown; pass 'random' where another run would draw them "
            "anew, or 'fixed' where it would start from the same ones (fine-tuning)."
        )


def given(counts: dict[str, int | None]) -> dict[str, int]:
    """The options that are not left to the package."""
    return {name: value for name, value in counts.items() if value is not None}


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
