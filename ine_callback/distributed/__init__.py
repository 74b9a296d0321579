"""Processes that train together, and parameters that are sharded over them."""
