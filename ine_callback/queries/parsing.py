"""What a user may write as queries, turned into named queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ine_callback.errors import QueryError
from ine_callback.queries.kinds import CallableQuery, GapQuery, LossQuery, MarginQuery, PerClassQuery, Query, SelfQuery


def parse(queries: Any, owner: str) -> dict[str, Query]:
    """Named queries from what a user wrote.

    Args:
        queries: ``"val"``, ``"self"``, a Query, a callable, a list of these, or a mapping of names to these, to
            DataLoaders, batches or lists of dataset indices.
        owner: Class named in messages.

    Raises:
        QueryError: If it is none of these, is empty, or gives two queries one name.
    """
    if isinstance(queries, Mapping):
        named = {str(name): _query(value, owner, named=True) for name, value in queries.items()}
    else:
        unnamed = queries if isinstance(queries, Sequence) and not isinstance(queries, str) else [queries]
        named = {}
        for value in unnamed:
            query = _query(value, owner, named=False)
            name = query.name or _default_name(query)
            if name in named:
                raise QueryError(f"{owner}: two queries are called '{name}'; pass a mapping with different names.")
            named[name] = query
    if not named:
        raise QueryError(f"{owner}: queries={queries!r} is empty; pass 'val', 'self', or a mapping of name to data.")
    return named


def _query(value: Any, owner: str, named: bool) -> Query:
    if isinstance(value, Query):
        return value
    if value == "self" if isinstance(value, str) else False:
        return SelfQuery()
    if isinstance(value, str):
        if value != "val":
            raise QueryError(f"{owner}: '{value}' is not a query; the words known are 'val' and 'self'.")
        return LossQuery("val")
    if callable(value) and not isinstance(value, nn.Module | Tensor | DataLoader):
        return CallableQuery(value)
    if named and value is not None and not isinstance(value, bool | int | float | nn.Module):
        return LossQuery(value)
    raise QueryError(
        f"{owner}: {value!r} ({type(value).__name__}) is not a query; pass 'val', 'self', a Query, a callable "
        "(module, batch) -> scalar, or a mapping of name to a DataLoader, a batch or a list of dataset indices."
    )


def _default_name(query: Query) -> str:
    if isinstance(query, PerClassQuery):
        return "class"
    if isinstance(query, MarginQuery):
        return "margin"
    if isinstance(query, GapQuery):
        return "gap"
    if isinstance(query, LossQuery):
        return query.data if isinstance(query.data, str) else "loss"
    return type(query).__name__
