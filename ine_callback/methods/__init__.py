"""Methods: what turns signals, or a trained model, into scores."""

from ine_callback.methods.base import Method, split_methods, training_methods
from ine_callback.methods.bif.settings import BIF
from ine_callback.methods.context import FitContext, RowGradients
from ine_callback.methods.fine import FINE
from ine_callback.methods.fit_end import FitEndMethod, FitEndMethods, PerSamplePass

__all__ = [
    "BIF",
    "FINE",
    "FitContext",
    "FitEndMethod",
    "FitEndMethods",
    "Method",
    "PerSamplePass",
    "RowGradients",
    "split_methods",
    "training_methods",
]
