"""Which dataset rows are in a batch: row ids travel with the batch through samplers, workers and prefetching.

While an iterator of the training loader is made, and only then, the loader shows a dataset whose items carry their
index and a collate function that gathers them; the user's dataset, sampler and loader objects stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from ine_callback.data.batches import size_of
from ine_callback.data.collate import Fate, Followed
from ine_callback.errors import RowsError, UnknownRows


@dataclass
class RowBatch:
    """A collated batch with the dataset index of each of its rows.

    Attributes:
        rows: Dataset indices [b], int64, on the CPU.
        batch: What the user's collate function returned.
        fate: How the rows follow from the items, or why they are unknown.
    """

    rows: Tensor
    batch: Any
    fate: Fate

    def pin_memory(self, device: str | None = None) -> RowBatch:
        """Called by the loader's pinning thread."""
        return RowBatch(self.rows, pin_memory(self.batch, device), self.fate)


class _Indexed(Dataset[Any]):
    """The user's dataset with every item as (index, item)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):  # the fetcher reads it off the instance
            self.__getitems__ = self._items

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self.dataset[index]

    def _items(self, indices: Sequence[Any]) -> list[tuple[Any, Any]]:
        return list(zip(indices, self.dataset.__getitems__(indices), strict=True))

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # unpickled in a worker before it has attributes
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Collate:
    """The user's collate function on the items, beside the vector of the rows' indices."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = Followed(collate)

    def __call__(self, items: Sequence[tuple[Any, Any]]) -> RowBatch:
        batch, fate = self._collate([item for _, item in items])
        rows = torch.empty(0, dtype=torch.int64)
        try:
            indices = torch.as_tensor([int(index) for index, _ in items], dtype=torch.int64)
            rows = rows if fate.places is None else indices[fate.places]
        except (TypeError, ValueError):
            kind = type(items[0][0]).__name__
            fate = Fate(None, f"the sampler names rows by values of type {kind}, which are no indices", always=True)
        return RowBatch(rows, batch, fate)


class RowTracker:
    """Makes training loaders yield :class:`RowBatch` and takes the rows off again.

    Args:
        owner: Class named in messages.
        remedy: What to do about a loader that does not tell its rows.

    Attributes:
        rows: Rows of the batch seen last, empty before the first.
        size: Length of the tracked training set, None before a loader was tracked.
    """

    def __init__(self, owner: str, remedy: str = "pass row_fn=lambda batch: tensor of dataset indices [b]") -> None:
        self._owner, self._remedy = owner, remedy
        self.rows = torch.empty(0, dtype=torch.int64)
        self._fate = Fate([])
        self.size: int | None = None
        self.loader: DataLoader[Any] | None = None

    def track(self, loader: Any) -> None:
        """Prepares a training loader, before its first iterator is made.

        Raises:
            RowsError: If the loader does not say which rows it reads.
        """
        remedy = self._remedy
        if not isinstance(loader, DataLoader):
            raise RowsError(f"{self._owner}: a {type(loader).__name__} does not tell its rows; {remedy}.")
        if isinstance(loader.dataset, IterableDataset):
            name = type(loader.dataset).__name__
            raise RowsError(f"{self._owner}: the iterable dataset {name} has no row indices; {remedy}.")
        if loader.batch_size is None and loader.batch_sampler is None:
            raise RowsError(
                f"{self._owner}: a loader with batch_size=None yields ready batches without row indices; {remedy}."
            )
        self.release()  # Lightning made the loader anew (reload_dataloaders_every_n_epochs)
        self.loader, self.size = loader, len(loader.dataset)  # type: ignore[arg-type]
        make, restart = type(loader)._get_iterator, loader._iterator is not None
        loader._iterator = None  # persistent workers started before hold the plain dataset

        def make_indexed() -> Any:
            nonlocal restart
            shown = {"dataset": _Indexed(loader.dataset), "collate_fn": _Collate(loader.collate_fn)}
            # the seed of workers that a plain run would not have restarted must not come from the run's random stream
            extra, restart = {"generator": torch.Generator().manual_seed(0)} if restart else {}, False
            with _showing(loader, {**shown, **extra}):
                return make(loader)

        loader.__dict__["_get_iterator"] = make_indexed

    def strip(self, batch: Any) -> Any:
        """Remembers a batch's rows and returns the user's batch, also from within the loader's containers."""
        if isinstance(batch, RowBatch):
            self.rows, self._fate = batch.rows, batch.fate
            return batch.batch
        if type(batch) in (list, tuple):
            parts = [self.strip(part) for part in batch]
            return batch if all(a is b for a, b in zip(parts, batch, strict=True)) else type(batch)(parts)
        if type(batch) is dict:
            stripped = {key: self.strip(part) for key, part in batch.items()}
            return batch if all(stripped[key] is batch[key] for key in batch) else stripped
        return batch

    def rows_of_last(self, batch: Any = None) -> Tensor:
        """The rows of the batch seen last, whichever is given.

        Raises:
            UnknownRows: If they are unknown.
        """
        return self._known(self.rows, self._fate)

    def rows_of(self, carrier: RowBatch, batch: Any = None) -> Tensor:
        """The rows of a batch that was not stripped here.

        Raises:
            UnknownRows: If they are unknown.
        """
        return self._known(carrier.rows, carrier.fate)

    def _known(self, rows: Tensor, fate: Fate) -> Tensor:
        if fate.places is None:
            raise UnknownRows(f"{self._owner}: {fate.reason}; {self._remedy}.", fate.always)
        return rows

    def release(self) -> None:
        """Gives the loader back; workers that hold the indexed dataset are restarted at its next use."""
        if self.loader is not None:
            self.loader.__dict__.pop("_get_iterator", None)
            self.loader._iterator = None
            self.loader = None


class RowCheck:
    """Checks the rows named for each batch.

    Args:
        owner: Class named in messages.
        size: Number of rows of the training set, or None where it is unknown.

    Attributes:
        count: Number of rows known to exist.
    """

    def __init__(self, owner: str, size: int | None) -> None:
        self._owner, self._size, self.count = owner, size, size or 0
        self._leading: bool | None = None

    def rows(self, found: Any, batch: Any) -> Tensor:
        """The rows as a vector of integers [b].

        Args:
            found: What names the rows.
            batch: The batch, or None where it is not at hand.

        Raises:
            RowsError: If they are no vector of indices, or lie outside of the training set.
            UnknownRows: If there are not as many as rows in the batch.
        """
        rows: Tensor = torch.as_tensor(found)
        if rows.dim() != 1 or rows.is_floating_point() or not len(rows):
            raise RowsError(
                f"{self._owner}: rows of shape {tuple(rows.shape)} and {rows.dtype} are no vector of dataset indices; "
                "name them as integers [b], one for each row of the batch (row_fn must return them so)."
            )
        if self._size is None:  # the state must grow before it is indexed
            rows = rows.cpu()
        if rows.device.type == "cpu":
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or (self._size is not None and high >= self._size):
                raise RowsError(
                    f"{self._owner}: row {low if low < 0 else high} is outside of the data set of {self._size} rows; "
                    "name dataset indices from 0 on."
                )
            self.count = max(self.count, high + 1)
        self._fit(len(rows), batch)
        return rows

    def _fit(self, rows: int, batch: Any) -> None:
        """Where the first batch's leading dimension was its number of rows, it must always be."""
        try:
            size = size_of(batch)
        except RowsError:
            return
        if self._leading is None:
            self._leading = size == rows
        elif self._leading and size != rows:
            raise UnknownRows(
                f"{self._owner}: {rows} rows were named for a batch of {size}; name one index for each row."
            )


@contextmanager
def _showing(loader: DataLoader[Any], attributes: dict[str, Any]) -> Iterator[None]:
    """Lets the loader show other attributes for a moment (it forbids plain assignment after construction)."""
    before = {name: getattr(loader, name) for name in attributes}
    loader.__dict__.update(attributes)
    try:
        yield
    finally:
        loader.__dict__.update(before)
