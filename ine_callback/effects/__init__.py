"""Effects of a treatment on an outcome by a causal graph, and each row's influence on their estimates."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ine_callback.effects.data import EffectData
from ine_callback.effects.discovery import discovered_graph
from ine_callback.effects.effect import Effect
from ine_callback.effects.estimands import ATE, NDE, NIE, WCDE
from ine_callback.effects.estimation import estimate
from ine_callback.effects.outcome import Outcome
from ine_callback.effects.path_effects import Paths, paths

if TYPE_CHECKING:
    from ine_callback.effects.flow import FlowSEM
    from ine_callback.effects.networks import CrossFitNuisances, Networks

__all__ = [
    "ATE",
    "NDE",
    "NIE",
    "WCDE",
    "CrossFitNuisances",
    "Effect",
    "EffectData",
    "FlowSEM",
    "Networks",
    "Outcome",
    "Paths",
    "discovered_graph",
    "estimate",
    "paths",
]

_WITH_TORCH = {"CrossFitNuisances": "networks", "Networks": "networks", "FlowSEM": "flow"}  # imported at first use


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
