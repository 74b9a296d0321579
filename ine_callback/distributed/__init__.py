"""Processes that train together, and parameters that they split."""
