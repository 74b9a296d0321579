"""Which training rows made the model what it is, recorded during the one run you do anyway."""

from ine_callback._version import __version__
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

__all__ = [
    "BIF",
    "FINE",
    "BIFScores",
    "Calibration",
    "CallableQuery",
    "EachRow",
    "InfluenceCallback",
    "InfluenceReport",
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
