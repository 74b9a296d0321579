"""All regimes, in the order of the table. Resuming joins here as a further list."""

from __future__ import annotations

from .adapters import ADAPTERS
from .architectures import ARCHITECTURES
from .compared import COMPARED
from .compiled import COMPILED
from .data import DATA
from .entries import ENTRIES
from .hugging_face import HUGGING_FACE
from .lightning_examples import EXAMPLES
from .models import MODELS
from .optimizers import OPTIMIZERS
from .options import OPTIONS
from .penalties import PENALTIES
from .public_issues import ISSUES
from .ragged import RAGGED
from .regime import Regime
from .together import TOGETHER

ALL: list[Regime] = [
    *OPTIONS,
    *OPTIMIZERS,
    *DATA,
    *MODELS,
    *COMPILED,
    *PENALTIES,
    *ENTRIES,
    *COMPARED,
    *RAGGED,
    *EXAMPLES,
    *ISSUES,
    *HUGGING_FACE,
    *ADAPTERS,
    *ARCHITECTURES,
    *TOGETHER,
]
assert len({regime.name for regime in ALL}) == len(ALL), "two regimes share a name"
