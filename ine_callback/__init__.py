"""Which training rows made the model what it is, recorded during the one run you do anyway."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ine_callback._version import __version__

if TYPE_CHECKING:
    from ine_callback.bif.calibration import Calibration, calibrate
    from ine_callback.bif.readout import EachRow
    from ine_callback.bif.rerun import run_bif
    from ine_callback.bif.run import bif_scores
    from ine_callback.bif.scores import BIFScores
    from ine_callback.callback import InfluenceCallback
    from ine_callback.capture.layers import register_layer
    from ine_callback.methods import BIF, FINE
    from ine_callback.queries import CallableQuery, LossQuery, MarginQuery, PerClassQuery, Query, SelfQuery
    from ine_callback.recorder import Recorder
    from ine_callback.report import InfluenceReport
    from ine_callback.sampler import InfluenceSampler

__all__ = [
    "BIF",
    "FINE",
    "BIFScores",
    "Calibration",
    "CallableQuery",
    "EachRow",
    "InfluenceCallback",
    "InfluenceReport",
    "InfluenceSampler",
    "LossQuery",
    "MarginQuery",
    "PerClassQuery",
    "Query",
    "Recorder",
    "SelfQuery",
    "__version__",
    "bif_scores",
    "calibrate",
    "register_layer",
    "run_bif",
]

# Imported at first use: reading a report, also by the command line, needs neither torch nor Lightning.
_MODULES = {
    "bif.calibration": ["Calibration", "calibrate"],
    "bif.readout": ["EachRow"],
    "bif.rerun": ["run_bif"],
    "bif.run": ["bif_scores"],
    "bif.scores": ["BIFScores"],
    "callback": ["InfluenceCallback"],
    "capture.layers": ["register_layer"],
    "methods": ["BIF", "FINE"],
    "queries": ["CallableQuery", "LossQuery", "MarginQuery", "PerClassQuery", "Query", "SelfQuery"],
    "recorder": ["Recorder"],
    "report": ["InfluenceReport"],
    "sampler": ["InfluenceSampler"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
