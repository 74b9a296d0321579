"""What chains read at every draw: the losses of the rows, the queries, and both to first order for the twins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.data.batches import cut, micro_batches, size_of
from ine_callback.errors import QueryError
from ine_callback.methods.bif.flat import Batch, Flat, Function
from ine_callback.methods.bif.posterior import LIMIT, jacobian
from ine_callback.methods.bif.rowloss import RowLosses
from ine_callback.methods.bif.sgld import Curved, Law
from ine_callback.queries import BoundQuery, parse
from ine_callback.queries.sources import DataSource
from ine_callback.scores import QueryInfo


@dataclass(frozen=True)
class EachRow:
    """One query for every row of a batch: that row's own loss, named ``name/k``. One pass reads them all.

    Attributes:
        batch: The rows.
    """

    batch: Any


@dataclass(frozen=True)
class Group:
    """Queries that are read together: k of them, sum over the batches of weight * function(module, batch) [k]."""

    infos: tuple[QueryInfo, ...]
    function: Function
    batches: tuple[tuple[float, Batch], ...]


def groups(queries: Any, losses: Function, owner: str) -> list[Group]:
    """Queries in any form that users may write (see :func:`ine_callback.queries.parse`), or :class:`EachRow`.

    Raises:
        QueryError: If there is none, or one that is no query.
    """
    source = DataSource(owner, lambda module, batch: losses(module, batch).mean())
    if not isinstance(queries, Mapping):
        return [_single(bound) for name, query in parse(queries, owner).items() for bound in query.bind(name, source)]
    found: list[Group] = []
    for name, value in queries.items():
        if isinstance(value, EachRow):
            question = f"Does training on this row lower the loss of query row {{}} of '{name}'?"
            infos = [QueryInfo(f"{name}/{k}", "loss", question.format(k)) for k in range(size_of(value.batch))]
            found.append(Group(tuple(infos), losses, ((1.0, value.batch),)))
            continue
        query = parse({name: value}, owner)[name]
        bound = [value] if isinstance(value, BoundQuery) else query.bind(name, source)
        found += [_single(each) for each in bound]
    if not found:
        raise QueryError(f"{owner}: queries={list(queries)} hold nothing to ask; 'self' is no query of BIF.")
    return found


def _single(bound: BoundQuery) -> Group:
    def value(module: nn.Module, batch: Batch) -> Tensor:
        return bound.value(module, batch).reshape(1)

    return Group((bound.info,), value, bound.batches)


class Readout:
    """Values and first-order changes of R rows and Q queries.

    Each row makes a line of ``width`` values: its loss, and with ``per_token`` what each of its T terms adds to it.

    Args:
        flat: The module.
        losses: Its row losses.
        rows: The rows to score, as one batch.
        queries: The queries.
        eval_rows: Rows evaluated at a time.
        terms: T to read each row's terms too, else 0.

    Attributes:
        width: 1 + T.
        count: R (1 + T).
    """

    def __init__(
        self, flat: Flat, losses: RowLosses, rows: Batch, queries: list[Group], eval_rows: int, terms: int = 0
    ) -> None:
        self.flat, self.width = flat, 1 + terms
        self.losses: Function = _Lines(losses) if terms else losses
        self.count = size_of(rows) * self.width
        self._rows = rows
        self._parts = micro_batches(rows, eval_rows)
        self._queries = queries
        self.infos = tuple(info for group in queries for info in group.infos)
        self._row_gradients: Tensor | None = None
        self._query_gradients = flat.weights.new_zeros(0, len(flat.weights))

    def rows(self, weights: Tensor) -> Tensor:
        """Lines [C, R (1 + T)] at weights [C, P]."""
        return torch.cat([self.flat.values(weights, self.losses, part) for part in self._parts], 1)

    def trained_and_blank(self) -> tuple[float, float]:
        """Mean loss of the rows at the trained weights, and where all are 0."""
        trained, blank = (self.rows(share * self.flat.weights[None])[:, :: self.width].mean() for share in (1.0, 0.0))
        return float(trained), float(blank)

    def queries(self, weights: Tensor) -> Tensor:
        """Queries [C, Q] at weights [C, P]."""
        return torch.cat([self._read(group, weights) for group in self._queries], 1)

    def _read(self, group: Group, weights: Tensor) -> Tensor:
        parts = [weight * self.flat.values(weights, group.function, batch) for weight, batch in group.batches]
        return torch.stack(parts).sum(0)

    def linearise(self) -> None:
        """Takes the gradients at the trained weights: all where they fit, else the queries' alone."""
        parameters = len(self.flat.weights)
        found = []
        for group in self._queries:
            if len(group.infos) > 1:  # a row each
                ((_, batch),) = group.batches
                found.append(jacobian(self.flat, group.function, batch))
                continue
            parts = [weight * self.flat.jacobian(self.flat.weights, group.function, b) for weight, b in group.batches]
            found.append(torch.stack(parts).sum(0))
        self._query_gradients = torch.cat(found)
        if self.count * parameters <= LIMIT:
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
        """Covariance [R (1 + T), Q] of first-order changes under the twin's law: gᵢᵀ V v, the Laplace term."""
        spread = coordinates.covariance(self._query_gradients, law)
        return torch.cat([self.row_changes(part) for part in spread.split(8)]).T


class _Lines:
    """A row's loss followed by what its terms add to it, as one flat tensor [b (1 + T)]."""

    def __init__(self, losses: RowLosses) -> None:
        self._losses = losses

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        terms = self._losses.terms(module, batch)
        return torch.cat([terms.sum(1, keepdim=True), terms], 1).flatten()


def chosen_rows(rows: Any, count: int, most: int, owner: str) -> tuple[Tensor, str | None]:
    """Dataset indices [R] to score, and a note where they are a sample.

    Args:
        rows: Indices, a number of rows, or None for all.
        count: Rows there are.
        most: At most so many where nothing is said.
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


def taken(data: Batch, rows: Tensor) -> Batch:
    """The given rows of a batch."""
    return cut(data, rows, size_of(data))
