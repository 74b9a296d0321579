"""Queries: what rows are measured against, and where their data comes from."""

from ine_callback.queries.queries import (
    SELF,
    Batch,
    BoundQuery,
    CallableQuery,
    LossQuery,
    MarginQuery,
    PerClassQuery,
    Query,
    QuerySource,
    SelfQuery,
    gradients,
    margins,
    parse,
    scalar,
)

__all__ = [
    "SELF",
    "Batch",
    "BoundQuery",
    "CallableQuery",
    "LossQuery",
    "MarginQuery",
    "PerClassQuery",
    "Query",
    "QuerySource",
    "SelfQuery",
    "gradients",
    "margins",
    "parse",
    "scalar",
]
