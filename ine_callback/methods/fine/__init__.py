"""f-INE: influence as a hypothesis test against training randomness (arXiv 2510.10510)."""

from ine_callback.methods.fine.fine import FINE

__all__ = ["FINE"]
