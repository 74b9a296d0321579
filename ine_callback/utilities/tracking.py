"""Progress of loops that take a while: a function that shows a bar, and one that shows none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def untracked(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """No progress bar."""
    return steps
