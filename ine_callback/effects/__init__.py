"""Effects of a treatment on an outcome, by a causal graph, and each row's influence on their estimates."""

from ine_callback.effects.data import EffectData
from ine_callback.effects.effect import Effect
from ine_callback.effects.estimands import ATE, NDE, NIE, WCDE
from ine_callback.effects.estimation import estimate
from ine_callback.effects.outcome import Outcome
from ine_callback.effects.path_effects import Paths, paths

__all__ = ["ATE", "NDE", "NIE", "WCDE", "Effect", "EffectData", "Outcome", "Paths", "estimate", "paths"]
