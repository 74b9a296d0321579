"""Methods: what turns signals into scores, one method a file."""

from ine_callback.methods.base import EndMethod, Method, checked_methods, split_methods
from ine_callback.methods.bif.settings import BIF
from ine_callback.methods.fine.fine import FINE

__all__ = ["BIF", "FINE", "EndMethod", "Method", "checked_methods", "split_methods"]
