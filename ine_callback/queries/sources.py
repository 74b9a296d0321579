"""Where queries get their data: the validation loader, any loader or batch, rows of the training set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from ine_callback.data.again import Again
from ine_callback.data.batches import count_of, cut, micro_batches
from ine_callback.data.collate import Followed
from ine_callback.data.row_entries import row_entries
from ine_callback.errors import QueryError
from ine_callback.queries.bound import Batch, QuerySource
from ine_callback.utilities.isolation import unmoved

LARGEST_BATCH = 256


class DataSource(QuerySource):
    """Finds the data that a query names, and reads it once.

    Args:
        owner: Class named in messages.
        loss: Mean loss of a batch, ``(module, batch) -> scalar``.
        train: The training loader, for lists of dataset indices.
        val: The validation loaders, for ``"val"``.
        limit: Rows taken of a larger loader: a fixed random sample.
    """

    def __init__(
        self,
        owner: str,
        loss: Callable[[nn.Module, Batch], Tensor] | None,
        train: Any = None,
        val: list[Any] | None = None,
        limit: int = 2000,
    ) -> None:
        self._owner, self._loss, self._train, self._val, self._limit = owner, loss, train, val or [], limit
        self.notes: list[str] = []
        self._counts: dict[int, int] = {}  # id of a batch whose rows cannot be counted -> items it was made of
        self._read_before: list[tuple[list[Any], list[Batch]]] = []
        self._collate = Followed(getattr(train, "collate_fn", default_collate))

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        if self._loss is None:
            raise QueryError(f"{self._owner}: a query needs the model's loss; pass loss=lambda module, batch: scalar.")
        return self._loss(module, batch)

    def size(self, batch: Batch) -> int:
        count = count_of(batch)
        if count is not None:
            return count
        if id(batch) not in self._counts:
            note = f"the rows of query batches of type {type(batch).__name__} cannot be counted: all weigh the same"
            self.notes.extend([note] if note not in self.notes else [])
        return self._counts.get(id(batch), 1)

    def batches(self, data: Any) -> list[Batch]:
        if isinstance(data, str):
            if data != "val":
                raise QueryError(f"{self._owner}: '{data}' is not a data set; the only word known is 'val'.")
            if not self._val:
                raise QueryError(
                    f"{self._owner}: query 'val' needs a validation loader and there is none; pass val_dataloaders, "
                    "raise limit_val_batches, or give the query its own data: queries={'name': loader}."
                )
            return self._read("val", self._val)
        if isinstance(data, list) and data and all(isinstance(row, int) for row in data):
            return self._rows(data)
        if isinstance(data, DataLoader) or _is_stream(data):
            return self._read(type(data).__name__, [data])
        return self._checked([] if _is_empty(data) else micro_batches(data, LARGEST_BATCH), data)

    def _read(self, name: str, loaders: list[Any]) -> list[Batch]:
        for known, batches in self._read_before:
            if len(known) == len(loaders) and all(a is b for a, b in zip(known, loaders, strict=True)):
                return batches
        with _without_trace(loaders):
            batches = [batch for loader in loaders for batch in self._sample(name, loader)]
        self._read_before.append((loaders, self._checked(batches, loaders[0])))
        return batches

    def _sample(self, name: str, loader: Any) -> list[Batch]:
        """All of a small loader; of a larger one a fixed random sample, or its first batches where it has no length."""
        dataset: Any = getattr(loader, "dataset", None)
        sized = (
            isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")
        )
        if sized and loader.batch_size is not None and len(dataset) > self._limit:
            picked = (
                torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: self._limit].sort().values
            )
            self.notes.append(f"query data '{name}': a random {self._limit} of {len(dataset)} rows")
            return self._loaded(dataset, picked.tolist(), loader)
        if sized and loader.batch_size is not None:
            return self._loaded(dataset, range(len(dataset)), loader)
        batches, rows = [], 0
        for batch in loader:
            batches += micro_batches(batch, LARGEST_BATCH)
            rows += count_of(batch) or 1
            if rows >= self._limit:
                self.notes.append(f"query data '{name}': its first {rows} rows")
                break
        return batches

    def _loaded(self, dataset: Any, rows: Sequence[int], loader: DataLoader[Any]) -> list[Batch]:
        batches = _load(dataset, rows, loader)
        for k, batch in enumerate(batches):
            self._counts[id(batch)] = len(rows[k * LARGEST_BATCH : (k + 1) * LARGEST_BATCH])
        return batches

    def _rows(self, rows: list[int]) -> list[Batch]:
        dataset = self._indexed(rows)
        with _without_trace([self._train]):
            return self._loaded(dataset, rows, self._train)

    def _indexed(self, rows: list[int]) -> Any:
        """The training set, if it has these rows."""
        dataset: Any = getattr(self._train, "dataset", None)
        if not self.is_indexed:
            raise QueryError(
                f"{self._owner}: {rows[:5]} are dataset indices, but the training set cannot be indexed; pass a batch."
            )
        unknown = [row for row in rows if not 0 <= row < len(dataset)]
        if unknown:
            raise QueryError(
                f"{self._owner}: rows {unknown[:5]} are not in the training set; valid are 0 to {len(dataset) - 1}."
            )
        return dataset

    @property
    def is_indexed(self) -> bool:
        """Whether the training set's rows can be read by their index."""
        dataset: Any = getattr(self._train, "dataset", None)
        return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")

    @property
    def training_rows(self) -> int:
        """Rows of the training set.

        Raises:
            QueryError: If it cannot be indexed.
        """
        return len(self._indexed([]))

    def training(self, rows: Sequence[int]) -> Batch:
        """Rows of the training set as one batch, by the loader's own collate function.

        Raises:
            QueryError: If the training set cannot be indexed, or has no such rows.
        """
        dataset = self._indexed(list(rows))
        with _without_trace([self._train]):
            return next(iter(_load(dataset, rows, self._train, len(rows))))

    def followed(self, rows: Sequence[int], named: bool = False) -> tuple[list[int], Batch]:
        """Rows of the training set as one batch, and the index of each row in it: a collate function sorts, or drops.

        Args:
            rows: Dataset indices.
            named: Whether the batch's own names of its rows are known to be these, in this order.

        Raises:
            QueryError: If the training set cannot be indexed, has no such rows, or the collate function leaves none, or
                rows of which nobody can tell what they are.
        """
        dataset = self._indexed(list(rows))
        with _without_trace([self._train]):
            (batch, fate), *_ = _load(dataset, rows, self._train, len(rows), self._collate)
        if named and fate.places is None:
            return list(rows), batch
        if fate.places is None or not fate.places:
            raise QueryError(f"{self._owner}: {fate.reason or 'the collate function leaves no row of a batch'}.")
        return [rows[place] for place in fate.places], batch

    def unreadable(self, row_fn: Callable[[Batch], Any] | None) -> str:
        """Why the training set's rows cannot be read by the ids that are recorded; nothing where they can.

        Args:
            row_fn: Names the rows of a batch; without it they are dataset indices.
        """
        if not self.is_indexed:
            return "this training set has no __getitem__ and __len__"
        some = sorted({0, self.training_rows // 2, self.training_rows - 1})
        if row_fn is None or self.training_rows == 0:
            return ""
        try:
            found = row_fn(self.training(some))
            entries = row_entries(found)
            named = torch.as_tensor(found if entries is None else entries.rows).tolist()
        except Exception as error:
            return f"row_fn fails for a batch of the items {some} ({type(error).__name__}: {error})"
        return "" if named == some else f"row_fn names the rows {named} for the items {some}"

    def _checked(self, batches: list[Batch], data: Any) -> list[Batch]:
        if not batches:
            raise QueryError(
                f"{self._owner}: the query's data ({type(data).__name__}) is empty; pass at least one batch."
            )
        return batches


@contextlib.contextmanager
def _without_trace(loaders: list[Any]) -> Iterator[None]:
    """Rows may be read inside: what datasets and collate functions draw or change is undone, for training goes on."""
    restores = [Again(loader.collate_fn).remember() for loader in loaders if hasattr(loader, "collate_fn")]
    try:
        with unmoved(loaders):
            yield
    finally:
        for restore in restores:
            restore()


def in_order(rows: Sequence[int], found: Sequence[int], batch: Batch, owner: str) -> Batch:
    """A batch that holds the rows ``found``, in the order of all the rows wanted.

    Raises:
        QueryError: If rows are missing.
    """
    if list(found) == list(rows):
        return batch
    if sorted(found) != sorted(rows):
        lost = sorted(set(rows).difference(found))
        raise QueryError(f"{owner}: the collate function drops rows ({lost[:5]}); leave them out of the data set.")
    place = {row: k for k, row in enumerate(found)}
    return cut(batch, torch.tensor([place[row] for row in rows]), len(rows))


def _load(
    dataset: Any,
    rows: Iterable[int],
    loader: DataLoader[Any],
    size: int = LARGEST_BATCH,
    collate: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Reads rows in this process with the loader's own collate function (its workers may be busy)."""
    return list(DataLoader(Subset(dataset, list(rows)), batch_size=size, collate_fn=collate or loader.collate_fn))


def _is_stream(data: Any) -> bool:
    """A loader of another library: iterable, and not itself a batch."""
    return (
        isinstance(data, Iterable) and not isinstance(data, list | tuple | dict | Tensor) and not hasattr(data, "keys")
    )


def _is_empty(data: Any) -> bool:
    return (not isinstance(data, Tensor) and hasattr(data, "__len__") and len(data) == 0) or count_of(data) == 0
