"""Options that callback and recorder share, with the one check of them."""

from __future__ import annotations

from typing import Literal, get_args

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
