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

    always = True  # no batch will be different


class UnknownRows(RowsError):
    """A batch whose rows cannot be told: it is left out, or the recording refused where no batch's ever could.

    Args:
        message: What is wrong and what to do.
        always: Whether every batch will be like it.
    """

    def __init__(self, message: str, always: bool = False) -> None:
        super().__init__(message)
        self.always = always
