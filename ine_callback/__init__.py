"""Which training rows made the model what it is, recorded during the one run you do anyway."""

from ine_callback._version import __version__
from ine_callback.callback import InfluenceCallback
from ine_callback.capture.layers import register_layer
from ine_callback.methods import FINE
from ine_callback.queries import CallableQuery, LossQuery, MarginQuery, PerClassQuery, Query, SelfQuery
from ine_callback.recorder import Recorder
from ine_callback.report import InfluenceReport

__all__ = [
    "FINE",
    "CallableQuery",
    "InfluenceCallback",
    "InfluenceReport",
    "LossQuery",
    "MarginQuery",
    "PerClassQuery",
    "Query",
    "Recorder",
    "SelfQuery",
    "__version__",
    "register_layer",
]
