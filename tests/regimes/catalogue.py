"""All regimes, in the order of the table. Distribution and resuming join here as further lists."""

from __future__ import annotations

from .data import DATA
from .hugging_face import HUGGING_FACE
from .models import MODELS
from .options import OPTIONS
from .regime import Regime

ALL: list[Regime] = [*OPTIONS, *DATA, *MODELS, *HUGGING_FACE]
assert len({regime.name for regime in ALL}) == len(ALL), "two regimes share a name"
