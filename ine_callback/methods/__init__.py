"""Methods: what turns signals, or a trained model, into scores."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ine_callback.methods.base import Method, split_methods, training_methods
    from ine_callback.methods.bif.bif import BIF
    from ine_callback.methods.context import FitContext
    from ine_callback.methods.effects import CausalEffects
    from ine_callback.methods.fairness.fair import FairSubspaces
    from ine_callback.methods.fine import FINE
    from ine_callback.methods.fit_end import FitEndMethod, FitEndMethods
    from ine_callback.methods.influence.influence import IF
    from ine_callback.methods.influence.token_influence import TokenInfluence
    from ine_callback.methods.kairos.kairos import KAIROS
    from ine_callback.methods.kairos.values import DataValues
    from ine_callback.methods.passes import PerSamplePass
    from ine_callback.methods.row_gradients import RowGradients

__all__ = [
    "BIF",
    "FINE",
    "IF",
    "KAIROS",
    "CausalEffects",
    "DataValues",
    "FairSubspaces",
    "FitContext",
    "FitEndMethod",
    "FitEndMethods",
    "Method",
    "PerSamplePass",
    "RowGradients",
    "TokenInfluence",
    "split_methods",
    "training_methods",
]

# Imported at first use: a saved report of chains is read without torch.
_MODULES = {
    "base": ["Method", "split_methods", "training_methods"],
    "bif.bif": ["BIF"],
    "context": ["FitContext"],
    "row_gradients": ["RowGradients"],
    "effects": ["CausalEffects"],
    "fairness.fair": ["FairSubspaces"],
    "fine": ["FINE"],
    "fit_end": ["FitEndMethod", "FitEndMethods"],
    "influence.influence": ["IF"],
    "influence.token_influence": ["TokenInfluence"],
    "kairos.kairos": ["KAIROS"],
    "kairos.values": ["DataValues"],
    "passes": ["PerSamplePass"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
