"""Queries: what rows are measured against, and where their data comes from."""

from ine_callback.queries.bound import Batch, BoundQuery, QuerySource
from ine_callback.queries.evaluation import gradients, scalar, values
from ine_callback.queries.kinds import (
    SELF,
    CallableQuery,
    GapQuery,
    LossQuery,
    MarginQuery,
    PerClassQuery,
    Query,
    SelfQuery,
    margins,
)
from ine_callback.queries.parsing import parse

__all__ = [
    "SELF",
    "Batch",
    "BoundQuery",
    "CallableQuery",
    "GapQuery",
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
    "values",
]
