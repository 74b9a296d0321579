"""A plain object in a module, whose contents training changes."""

from __future__ import annotations

import threading
from typing import ClassVar


class Meter:
    """A plain object that counts."""

    total: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        self.sum, self.values, self.lock = 0.0, [1.0], threading.Lock()

    def update(self, value: float) -> None:
        self.sum += value
        self.values.append(value)
        self.total[0] += 1
