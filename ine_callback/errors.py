"""Errors that a user can cause and mend. Each message names the class, the value and the remedy."""

from __future__ import annotations


class InfluenceError(ValueError):
    """Base of the package's errors about configuration and data."""


class QueryError(InfluenceError):
    """A query that is no query, has no data, or no gradient."""


class RowsError(InfluenceError):
    """Row identities that are missing or do not fit the batch."""


class CaptureError(InfluenceError):
    """Parameters whose per-row gradients cannot be captured, with ``uncaptured="raise"``."""
