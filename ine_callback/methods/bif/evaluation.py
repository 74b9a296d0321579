"""Evaluates row losses and queries at every draw, and their first-order changes for the control-variate chains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ine_callback.errors import InfluenceError, QueryError
from ine_callback.methods.bif.dense_embeddings import DenseEmbeddings
from ine_callback.methods.bif.flat_module import Batch, FlatModule, Function
from ine_callback.methods.bif.posterior import MAX_GRADIENT_ENTRIES, jacobian
from ine_callback.methods.bif.rows import MAX_PASS_ROWS, RowLosses, Rows
from ine_callback.methods.bif.sgld import Curved, Law
from ine_callback.queries import BoundQuery, LossQuery, Query, parse
from ine_callback.queries.sources import DataSource
from ine_callback.scores import QueryInfo


@dataclass(frozen=True)
class EachRow:
    """One query for each row of a batch: the loss of that row, named ``name/k``. One pass evaluates them all.

    Attributes:
        batch: The rows.
    """

    batch: Any


@dataclass(frozen=True)
class Group:
    """k queries that one function evaluates: sum over the batches of weight * function(module, batch) [k]."""

    infos: tuple[QueryInfo, ...]
    function: Function
    batches: tuple[tuple[float, Batch], ...]


class QueryReader:
    """Makes groups of queries, with their data on the module's device.

    Args:
        flat: The module.
        losses: Its row losses.
        owner: Class named in messages.
    """

    def __init__(self, flat: FlatModule, losses: RowLosses, owner: str) -> None:
        self._flat, self._losses, self._owner = flat, losses, owner
        self._source = DataSource(owner, self._mean)

    def groups(self, queries: Any) -> list[Group]:
        """Queries in any form that users may write (see :func:`ine_callback.queries.parse`), or :class:`EachRow`.

        Raises:
            QueryError: If there is none, or one that is no query.
        """
        if not isinstance(queries, Mapping):
            named = parse(queries, self._owner).items()
            return [self._single(bound) for name, query in named for bound in query.bind(name, self._source)]
        found = [group for name, value in queries.items() for group in self._groups(str(name), value)]
        if not found:
            raise QueryError(
                f"{self._owner}: queries={list(queries)} contain no query that BIF can evaluate ('self' is none)."
            )
        return found

    def _groups(self, name: str, value: Any) -> list[Group]:
        if isinstance(value, EachRow):
            rows = self._rows(value.batch)
            question = f"Does training on this row lower the loss of query row {{}} of '{name}'?"
            infos = [QueryInfo(f"{name}/{k}", "loss", question.format(k)) for k in range(len(rows))]
            return [Group(tuple(infos), self._losses, ((1.0, rows),))]
        if isinstance(value, BoundQuery):
            return [self._single(value)]
        query = parse({name: value}, self._owner)[name]
        if (
            isinstance(query, LossQuery)
            and self._losses.whole
            and not isinstance(value, str | list | DataLoader | Query)
        ):
            info = QueryInfo(name, "loss", "Does training on this row lower the mean loss on the query's data?")
            # only the row losses know how many rows such data have
            return [Group((info,), self._mean, ((1.0, self._rows(value)),))]
        bound = query.bind(name, self._source)
        return [self._single(each) for each in bound]

    def _single(self, bound: BoundQuery) -> Group:
        if bound.value == self._source.loss:
            parts = [
                (weight * len(part) / len(rows), part)
                for weight, batch in bound.batches
                for rows in [self._rows(batch)]
                for part in rows.split(MAX_PASS_ROWS)
            ]
            return Group((bound.info,), self._mean, tuple(parts))

        def value(module: nn.Module, batch: Batch) -> Tensor:
            return bound.value(module, batch).reshape(1)

        return Group((bound.info,), value, tuple((weight, self._moved(batch)) for weight, batch in bound.batches))

    def _mean(self, module: nn.Module, rows: Rows) -> Tensor:
        """The training's loss of some rows [1]."""
        return self._losses.contributions(module, rows).mean()[None]

    def _rows(self, batch: Batch) -> Rows:
        with DenseEmbeddings():
            return self._losses.rows(self._flat.module, self._moved(batch))

    def _moved(self, batch: Batch) -> Batch:
        return batch if isinstance(batch, Rows) else move_data_to_device(batch, self._flat.weights.device)


class DrawEvaluator:
    """Values and first-order changes of R rows and Q queries.

    Each row gives ``width`` values, here called its line: its loss, and with ``per_token`` the part of each of its T
    terms.

    Args:
        flat: The module.
        losses: Its row losses.
        rows: The rows to score.
        queries: The queries.
        eval_rows: Rows evaluated at a time.
        terms: T to evaluate each row's terms too, else 0.

    Attributes:
        width: 1 + T.
        count: R (1 + T).
    """

    def __init__(
        self, flat: FlatModule, losses: RowLosses, rows: Rows, queries: list[Group], eval_rows: int, terms: int = 0
    ) -> None:
        self.flat, self.width = flat, 1 + terms
        self.losses: Function = _Lines(losses, terms) if terms else losses
        self.count = len(rows) * self.width
        self._rows = rows
        self._parts = rows.split(eval_rows)
        self._queries = queries
        self.infos = tuple(info for group in queries for info in group.infos)
        self._row_gradients: Tensor | None = None
        self._query_gradients = flat.weights.new_zeros(0, len(flat.weights))

    def rows(self, weights: Tensor) -> Tensor:
        """Lines [C, R (1 + T)] at weights [C, P]."""
        return torch.cat([self.flat.values(weights, self.losses, part) for part in self._parts], 1)

    def trained_and_blank(self) -> tuple[float, float]:
        """Mean loss of the rows at the trained weights, and where all are 0."""
        trained, blank = (
            self.rows(fraction * self.flat.weights[None])[:, :: self.width].mean() for fraction in (1.0, 0.0)
        )
        return float(trained), float(blank)

    def queries(self, weights: Tensor) -> Tensor:
        """Queries [C, Q] at weights [C, P]."""
        return torch.cat([self._read(group, weights) for group in self._queries], 1)

    def _read(self, group: Group, weights: Tensor) -> Tensor:
        parts = [weight * self.flat.values(weights, group.function, batch) for weight, batch in group.batches]
        return torch.stack(parts).sum(0)

    def linearise(self) -> None:
        """Computes the gradients at the trained weights: the queries', and the rows' where they fit into memory."""
        parameters = len(self.flat.weights)
        found = []
        for group in self._queries:
            if len(group.infos) > 1:  # one query for each row of the batch
                ((_, batch),) = group.batches
                found.append(jacobian(self.flat, group.function, batch))
                continue
            parts = [weight * self.flat.jacobian(self.flat.weights, group.function, b) for weight, b in group.batches]
            found.append(torch.stack(parts).sum(0))
        self._query_gradients = torch.cat(found)
        if self.count * parameters <= MAX_GRADIENT_ENTRIES:
            self._row_gradients = jacobian(self.flat, self.losses, self._rows)

    def row_changes(self, deviations: Tensor) -> Tensor:
        """First-order changes of the lines [C, R (1 + T)] for deviations [C, P]: ⟨gᵢ, δ⟩."""
        if self._row_gradients is not None:
            return deviations @ self._row_gradients.T
        return torch.cat([self.flat.products(deviations, self.losses, part) for part in self._parts], 1)

    def query_changes(self, deviations: Tensor) -> Tensor:
        """First-order changes of the queries [C, Q] for deviations [C, P]."""
        return deviations @ self._query_gradients.T

    def covariance(self, coordinates: Curved, law: Law) -> Tensor:
        """Laplace term [R (1 + T), Q]: covariance gᵢᵀ V v of first-order changes under the control variates' law."""
        spread = coordinates.covariance(self._query_gradients, law)
        return torch.cat([self.row_changes(part) for part in spread.split(8)]).T


class _Lines:
    """A row's loss followed by what its terms add to it, as one flat tensor [b (1 + T)]."""

    def __init__(self, losses: RowLosses, count: int) -> None:
        self._losses, self._count = losses, count

    def __call__(self, module: nn.Module, rows: Rows) -> Tensor:
        terms = self._losses.terms(module, rows)
        if terms.shape[1] != self._count:
            raise InfluenceError(
                f"BIF: per_token=True needs as many terms in every batch, but there are {terms.shape[1]} and "
                f"{self._count}; pad all rows to one length."
            )
        return torch.cat([terms.sum(1, keepdim=True), terms], 1).flatten()


def chosen_rows(rows: Any, count: int, most: int, owner: str) -> tuple[Tensor, str | None]:
    """Dataset indices [R] to score, and a note where they are a sample.

    Args:
        rows: Indices, a number of rows, or None for all.
        count: Number of training rows.
        most: Greatest number of rows where ``rows`` is None.
        owner: Class named in messages.

    Raises:
        QueryError: For rows that do not exist.

    Example:
        >>> chosen_rows([3, 1], 10, 100, "BIF")
        (tensor([3, 1]), None)
    """
    if rows is None or isinstance(rows, int):
        size = min(count, most if rows is None else rows)
        if size == count:
            return torch.arange(count), None
        picked = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size].sort().values
        return picked, f"scored are {size} of {count} rows, drawn at random; name others with rows="
    index = torch.as_tensor(list(rows), dtype=torch.int64)
    outside = index[(index < 0) | (index >= count)]
    if not len(index) or len(outside):
        raise QueryError(f"{owner}: rows={index[:5].tolist()} must be dataset indices, 0 to {count - 1}.")
    return index, None
