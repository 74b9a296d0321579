"""What Lightning asks for callbacks for every Trainer (entry point ``callbacks_factory``)."""

from __future__ import annotations

import os
from typing import Any

NAME = "INE_CALLBACK"
OFF, ON = ("", "0", "false", "off", "no"), ("1", "true", "on", "yes")


def callbacks() -> list[Any]:
    """Nothing, or with ``INE_CALLBACK=1`` a callback that records ``"self"``, and ``"val"`` where there are such data.

    It steps back where the Trainer has an :class:`~ine_callback.InfluenceCallback` of its own.

    Raises:
        InfluenceError: If the variable is neither on nor off.

    Example:
        >>> callbacks()
        []
    """
    value = os.environ.get(NAME, "").strip().lower()
    if value in OFF:
        return []
    if value not in ON:
        from ine_callback.errors import InfluenceError

        raise InfluenceError(f"{NAME}={os.environ[NAME]!r} is neither on nor off; set it to 1 or 0, or unset it.")
    from ine_callback.integrations.environment import EnvironmentCallback

    return [EnvironmentCallback()]
