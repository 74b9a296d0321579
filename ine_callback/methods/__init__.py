"""Methods: what turns signals into scores, one method a file."""

from ine_callback.methods.base import Method, checked_methods
from ine_callback.methods.fine import FINE

__all__ = ["FINE", "Method", "checked_methods"]
