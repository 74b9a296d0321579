"""Which training rows made the model what it is, recorded during the one run you do anyway."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ine_callback._version import __version__

if TYPE_CHECKING:
    from ine_callback.applications.fairness import Subspaces
    from ine_callback.applications.sampler import InfluenceSampler
    from ine_callback.applications.suppression import SuppressTokens, suppressed_cross_entropy
    from ine_callback.applications.token_mask import TokenMask, token_mask
    from ine_callback.capture.layers import register_layer
    from ine_callback.data.row_entries import RowEntries
    from ine_callback.integrations.ask import ask
    from ine_callback.integrations.callback import InfluenceCallback
    from ine_callback.integrations.rerun import run_bif, run_if, run_unlearning
    from ine_callback.methods import (
        BIF,
        FINE,
        IF,
        KAIROS,
        CausalEffects,
        DataValues,
        FairSubspaces,
        FitContext,
        FitEndMethod,
        PerSamplePass,
        TokenInfluence,
    )
    from ine_callback.methods.airrep.airrep import AirRep
    from ine_callback.methods.airrep.encoder import FeatureEncoder
    from ine_callback.methods.airrep.retraining import retraining
    from ine_callback.methods.bif.calibration import Calibration, calibrate
    from ine_callback.methods.bif.evaluation import EachRow
    from ine_callback.methods.bif.run import bif_scores
    from ine_callback.methods.bif.scores import BIFScores
    from ine_callback.methods.fairness.settings import FairSettings
    from ine_callback.methods.fairness.subspaces import fair_subspaces
    from ine_callback.methods.kairos.values import kairos
    from ine_callback.optimizers import register_optimizer
    from ine_callback.queries import CallableQuery, GapQuery, LossQuery, MarginQuery, PerClassQuery, Query, SelfQuery
    from ine_callback.recording.config import RecordingConfig
    from ine_callback.recording.recorder import Recorder
    from ine_callback.recording.store.settings import GradientStore
    from ine_callback.report import InfluenceReport
    from ine_callback.scores import Attribution

__all__ = [
    "BIF",
    "FINE",
    "IF",
    "KAIROS",
    "AirRep",
    "Attribution",
    "BIFScores",
    "Calibration",
    "CallableQuery",
    "CausalEffects",
    "DataValues",
    "EachRow",
    "FairSettings",
    "FairSubspaces",
    "FeatureEncoder",
    "FitContext",
    "FitEndMethod",
    "GapQuery",
    "GradientStore",
    "InfluenceCallback",
    "InfluenceReport",
    "InfluenceSampler",
    "LossQuery",
    "MarginQuery",
    "PerClassQuery",
    "PerSamplePass",
    "Query",
    "Recorder",
    "RecordingConfig",
    "RowEntries",
    "SelfQuery",
    "Subspaces",
    "SuppressTokens",
    "TokenInfluence",
    "TokenMask",
    "__version__",
    "ask",
    "bif_scores",
    "calibrate",
    "fair_subspaces",
    "kairos",
    "register_layer",
    "register_optimizer",
    "retraining",
    "run_bif",
    "run_if",
    "run_unlearning",
    "suppressed_cross_entropy",
    "token_mask",
]

# Imported at first use: reading a report, also by the command line, needs neither torch nor Lightning.
_MODULES = {
    "methods.airrep.airrep": ["AirRep"],
    "methods.airrep.encoder": ["FeatureEncoder"],
    "methods.airrep.retraining": ["retraining"],
    "methods.bif.calibration": ["Calibration", "calibrate"],
    "methods.bif.evaluation": ["EachRow"],
    "integrations.ask": ["ask"],
    "integrations.rerun": ["run_bif", "run_if", "run_unlearning"],
    "methods.bif.run": ["bif_scores"],
    "methods.bif.scores": ["BIFScores"],
    "integrations.callback": ["InfluenceCallback"],
    "capture.layers": ["register_layer"],
    "data.row_entries": ["RowEntries"],
    "methods.kairos.values": ["kairos"],
    "methods.fairness.settings": ["FairSettings"],
    "methods.fairness.subspaces": ["fair_subspaces"],
    "methods": [
        "BIF",
        "FINE",
        "IF",
        "KAIROS",
        "CausalEffects",
        "DataValues",
        "FitContext",
        "FitEndMethod",
        "PerSamplePass",
        "TokenInfluence",
        "FairSubspaces",
    ],
    "optimizers": ["register_optimizer"],
    "queries": ["CallableQuery", "GapQuery", "LossQuery", "MarginQuery", "PerClassQuery", "Query", "SelfQuery"],
    "recording.config": ["RecordingConfig"],
    "recording.recorder": ["Recorder"],
    "recording.store.settings": ["GradientStore"],
    "report": ["InfluenceReport"],
    "scores": ["Attribution"],
    "applications.fairness": ["Subspaces"],
    "applications.sampler": ["InfluenceSampler"],
    "applications.suppression": ["SuppressTokens", "suppressed_cross_entropy"],
    "applications.token_mask": ["TokenMask", "token_mask"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
