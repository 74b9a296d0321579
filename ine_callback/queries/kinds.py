"""Kinds of queries: scalars of the model, better when lower, whose gradients rows are measured against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.data.attribute import Attribute, attribute_of
from ine_callback.data.batches import cut, size_of
from ine_callback.errors import QueryError
from ine_callback.queries.bound import Batch, BoundQuery, QuerySource, Value
from ine_callback.scores import QueryInfo

Forward = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


class Query(ABC):
    """A question about the trained model. Subclasses define its scalar; the factories below make the common ones.

    Every query is better when lower, so a positive score means that training on the row *lowers* it (helpful).
    """

    name: str | None = None

    @abstractmethod
    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        """Finds the data and returns one or several bound queries."""

    @staticmethod
    def loss(data: Any = "val", name: str | None = None) -> LossQuery:
        """Mean loss of the module on ``data`` (``"val"``, a DataLoader, a batch, a list of dataset indices)."""
        return LossQuery(data, name)

    @staticmethod
    def per_class(data: Any = "val", name: str | None = None) -> PerClassQuery:
        """One query for each class: the mean loss on the rows of ``data`` with that label."""
        return PerClassQuery(data, name)

    @staticmethod
    def margin(data: Any = "val", per_row: bool = False, name: str | None = None) -> MarginQuery:
        """Negated mean margin ``-log(p / (1 - p))`` of the true class on ``data``; ``per_row`` asks for each row."""
        return MarginQuery(data, per_row, name)

    @staticmethod
    def gap(
        sensitive: Attribute, data: Any = "val", name: str | None = None, positive: int | Sequence[int] = 1
    ) -> GapQuery:
        """Mean predicted probability of class ``positive`` on the rows of ``data`` in group 1, less that in group 0."""
        return GapQuery(sensitive, data, name, positive)


class LossQuery(Query):
    """Mean loss of the module's own step on some data.

    Args:
        data: ``"val"`` (the trainer's validation loader), a DataLoader, a batch, or a list of dataset indices.
        name: Column name; by default the key it is given under, or a name made from ``data``.
    """

    def __init__(self, data: Any = "val", name: str | None = None) -> None:
        self.data, self.name = data, name

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        batches = _weighted(source.batches(self.data), source.size)
        info = QueryInfo(name, "loss", f"Does training on this row lower the mean loss on {_describe(self.data)}?")
        return [BoundQuery(info, source.loss, batches)]


class PerClassQuery(Query):
    """One query for each class: the mean loss on that class's rows.

    Args:
        data: As for :class:`LossQuery`.
        name: Prefix of the columns ``name/class``; by default "class".
        label: Key or position of the label in a batch (for the common ``(x, y)``: 1).
    """

    def __init__(self, data: Any = "val", name: str | None = None, label: int | str = 1) -> None:
        self.data, self.name, self.label = data, name, label

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        of_class: dict[int, list[Batch]] = {}
        for batch in source.batches(self.data):
            labels = _labels(batch, self.label, name)
            for label in labels.unique().tolist():
                of_class.setdefault(int(label), []).append(cut(batch, torch.where(labels == label)[0], len(labels)))
        where = _describe(self.data)
        return [
            BoundQuery(
                QueryInfo(
                    f"{name}/{label}", "loss", f"Does training on this row lower the loss on class {label} of {where}?"
                ),
                source.loss,
                _weighted(of_class[label]),
            )
            for label in sorted(of_class)
        ]


class MarginQuery(Query):
    """Negated margin ``-log(p / (1 - p))`` of the true class: the better question on rows that the model has learnt.

    A saturated loss has no gradient left, but its log-odds still change. Lower is better, as for every query, so a
    positive score means that training on the row raises the margin.

    Args:
        data: As for :class:`LossQuery`.
        per_row: One query for each row of ``data`` instead of their mean.
        name: Column name, or the prefix of ``name/k`` with ``per_row``.
        forward: Maps (module, batch) to (logits [b, C, ...], labels [b, ...]); by default ``module(x), y`` for a
            batch ``(x, y)``.
    """

    def __init__(
        self, data: Any = "val", per_row: bool = False, name: str | None = None, forward: Forward | None = None
    ) -> None:
        self.data, self.per_row, self.name, self.forward = data, per_row, name, forward or _logits_and_labels

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        batches = source.batches(self.data)
        info = QueryInfo(
            name, "margin", f"Does training on this row raise the margin of the true class on {_describe(self.data)}?"
        )
        if not self.per_row:
            return [BoundQuery(info, self._value, _weighted(batches, source.size))]
        rows = [cut(batch, torch.tensor([k]), size_of(batch)) for batch in batches for k in range(size_of(batch))]
        question = "Does training on this row raise the margin of query row {} of {}?"
        return [
            BoundQuery(
                replace(info, name=f"{name}/{k}", question=question.format(k, _describe(self.data))),
                self._value,
                ((1.0, row),),
            )
            for k, row in enumerate(rows)
        ]

    def _value(self, module: nn.Module, batch: Batch) -> Tensor:
        logits, labels = self.forward(module, batch)
        return -margins(logits, labels).mean()


class GapQuery(Query):
    """Parity gap: mean predicted probability in group 1, less that in group 0; 0 where groups are treated alike.

    Its sign is kept, so that it has a gradient everywhere. Below 0 group 1 has the lower scores, and helpful rows widen
    the gap: swap ``groups``.

    Args:
        sensitive: Where each row's group is: key or position in a batch, or a function of the batch.
        data: As for :class:`LossQuery`.
        name: Column name; by default "gap".
        positive: The class whose probability is the score; of several, their sum. A model with one output a row has its
            logistic function in place of it.
        groups: The two values of the attribute that are compared, "1 less 0"; rows with others are left out.
        forward: Maps (module, batch) to logits [b, C], [b, 1] or [b]; by default ``module(x)`` of a batch ``(x, ...)``.
    """

    def __init__(
        self,
        sensitive: Attribute,
        data: Any = "val",
        name: str | None = None,
        positive: int | Sequence[int] = 1,
        groups: Sequence[float] = (1, 0),
        forward: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> None:
        self.sensitive, self.data, self.name = sensitive, data, name
        self.positive = [positive] if isinstance(positive, int) else list(positive)
        self.groups, self.forward = tuple(groups), forward or _logits
        if len(self.groups) != 2 or self.groups[0] == self.groups[1]:
            raise QueryError(f"GapQuery: groups={list(groups)} must be two different values of the attribute.")

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        batches = source.batches(self.data)
        found = torch.cat([self._groups(batch).cpu() for batch in batches])
        counts = [int((found == group).sum()) for group in self.groups]
        if not all(counts):
            there = found.unique()[:5].tolist()
            raise QueryError(
                f"GapQuery '{name}': {_describe(self.data)} has {counts} rows of the groups {list(self.groups)}; its "
                f"values are {there}. Name the two to compare in groups=."
            )
        high, low = self.groups
        question = f"Does training on this row lower the score of group {high} beside {low} on {_describe(self.data)}?"

        def value(module: nn.Module, batch: Batch) -> Tensor:
            score, group = self._scores(module, batch), self._groups(batch)
            parts = [torch.where(group == g, score, 0).sum() / n for g, n in zip(self.groups, counts, strict=True)]
            return len(batches) * (parts[0] - parts[1])  # the batches' mean is the gap of all rows

        return [BoundQuery(QueryInfo(name, "custom", question), value, tuple((1 / len(batches), b) for b in batches))]

    def _groups(self, batch: Batch) -> Tensor:
        return attribute_of(batch, self.sensitive, size_of(batch), "GapQuery: sensitive")

    def _scores(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = self.forward(module, batch)
        logits = logits.flatten(1) if logits.dim() > 1 else logits[:, None]
        if logits.shape[1] == 1:
            return logits[:, 0].sigmoid()
        if not 0 <= min(self.positive) <= max(self.positive) < logits.shape[1]:
            raise QueryError(f"GapQuery: positive={self.positive} names none of the {logits.shape[1]} classes.")
        return logits.softmax(1)[:, self.positive].sum(1)


class CallableQuery(Query):
    """Any scalar: ``function(module, batch) -> tensor``, averaged over the batches of ``data``; lower is better.

    Args:
        function: Returns a scalar tensor with a gradient.
        data: As for :class:`LossQuery`.
        name: Column name; by default the function's name.
    """

    def __init__(self, function: Value, data: Any = "val", name: str | None = None) -> None:
        self.function, self.data = function, data
        self.name = name or getattr(function, "__name__", None)

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        info = QueryInfo(name, "custom", f"Does training on this row lower '{name}' on {_describe(self.data)}?")
        return [BoundQuery(info, self.function, _weighted(source.batches(self.data), source.size))]


class SelfQuery(Query):
    """The loss on the row itself: self-influence, the score that finds mislabelled rows (docs/methods/fine.md)."""

    name = "self"

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        return []


SELF = QueryInfo(
    "self",
    "self",
    "Does this row lower its own loss more (positive) than its batch-mates do? High: mislabelled, rare or hard.",
)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of the true class, for logits [b, C, ...] and labels [b, ...].

    Raises:
        QueryError: If the labels are no class indices.

    Example:
        >>> import torch
        >>> margins(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([2.])
    """
    if labels.is_floating_point():
        raise QueryError(
            f"MarginQuery: labels are {labels.dtype}, not class indices; for numbers ask for the loss "
            "(Query.loss) or give a function."
        )
    target = labels.unsqueeze(1)
    others = logits.scatter(1, target, float("-inf"))
    return logits.gather(1, target).squeeze(1) - others.logsumexp(1)


def _describe(data: Any) -> str:
    if isinstance(data, str):
        return "the validation set"
    if isinstance(data, list) and all(isinstance(row, int) for row in data):
        return f"{len(data)} chosen training rows"
    return "the query's data"


def _weighted(batches: Sequence[Batch], size: Callable[[Batch], int] = size_of) -> tuple[tuple[float, Batch], ...]:
    sizes = [size(batch) for batch in batches]
    total = sum(sizes)
    return tuple((size / total, batch) for size, batch in zip(sizes, batches, strict=True))


def _labels(batch: Batch, label: int | str, name: str) -> Tensor:
    try:
        labels = batch[label]
    except (KeyError, IndexError, TypeError) as error:
        raise QueryError(
            f"PerClassQuery '{name}': a batch of type {type(batch).__name__} has no label at {label!r} ({error}); "
            "pass label= the position or key of the class labels."
        ) from error
    if not (isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()):
        raise QueryError(
            f"PerClassQuery '{name}': the labels at {label!r} are not a vector of integer classes; "
            "pass label= the position or key of the class labels."
        )
    return labels


def _logits_and_labels(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    try:
        x, y = batch
    except (TypeError, ValueError) as error:
        raise QueryError(
            f"MarginQuery: a batch of type {type(batch).__name__} is not a pair (x, y); pass "
            "forward=lambda module, batch: (logits, labels)."
        ) from error
    return module(x), y


def _logits(module: nn.Module, batch: Batch) -> Tensor:
    if not (isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor)):
        raise QueryError(
            f"GapQuery: a batch of type {type(batch).__name__} does not begin with the inputs; pass "
            "forward=lambda module, batch: logits."
        )
    logits: Tensor = module(batch[0])
    return logits
