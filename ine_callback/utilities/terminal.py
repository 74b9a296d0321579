"""What is printed in a terminal, as text."""

from __future__ import annotations

from io import StringIO
from typing import Any

SHOWN = 20  # lines of a table


def as_text(renderable: Any, width: int = 110) -> str:
    """A rich renderable as plain text without colours and trailing blanks."""
    from rich.console import Console

    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
