"""Regimes of the data: datasets, samplers, loaders, batches of every structure, augmentation."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, WeightedRandomSampler, default_collate

from .regime import BATCH, ROWS, Classifier, Data, Item, Regime, vectors


class Stream(IterableDataset[Item]):
    """The rows one after the other, without a length."""

    def __init__(self, items: Dataset[Item]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item]:
        return (self.items[row] for row in range(ROWS))


class Ready(Dataset[Any]):
    """Whole batches as items."""

    def __init__(self, items: Dataset[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return ROWS // 5

    def __getitem__(self, index: int) -> Any:
        return default_collate([self.items[row] for row in range(5 * index, 5 * index + 5)])


class Ragged(Sampler[list[int]]):
    """Batches of many sizes, with a row alone and a row twice in its batch."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[3, 1, 2], [0, 19], [7], [5, 6, 7, 8, 9, 10, 11], [4, 4, 18, 12]])


@dataclass
class Fields:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor
    row: Tensor


def as_dict(items: list[Item]) -> dict[str, Tensor]:
    x, y, row = default_collate(items)
    return {"row": row, "x": x, "y": y}


def as_mapping(items: list[Item]) -> UserDict[str, Tensor]:
    """A mapping that is no dict, like the BatchEncoding of Hugging Face."""
    return UserDict(as_dict(items))


def as_tuple(items: list[Item]) -> tuple[Any, ...]:
    x, y, row = default_collate(items)
    return (x, y, row)


def as_fields(items: list[Item]) -> Fields:
    x, y, row = default_collate(items)
    return Fields(x, y, row)


class Named(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch["x"], batch["y"]))


class Changes(Classifier):
    """Takes the labels out of the batch, as many steps for Hugging Face's do, and writes into its inputs."""

    def loss(self, batch: Any) -> Tensor:
        batch["x"].mul_(0.5).add_(0.1)
        return super().loss((batch["x"], batch.pop("y")))


class FromFields(Classifier):
    def loss(self, batch: Fields) -> Tensor:
        return super().loss((batch.x, batch.y))


class Both(Classifier):
    """Two loaders' batches in one pass."""

    def loss(self, batch: Any) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        return super().loss([torch.cat([part[k] for part in parts]) for k in (0, 1)])


def rows_of_both(batch: Any) -> Tensor:
    return torch.cat([part[2] for part in batch.values()])


class Halved(Dataset[Item]):
    """The even or the odd rows."""

    def __init__(self, items: Dataset[Item], odd: int) -> None:
        self.items, self.odd = items, odd

    def __len__(self) -> int:
        return ROWS // 2

    def __getitem__(self, index: int) -> Item:
        return self.items[2 * index + self.odd]


def combined(items: Dataset[Item]) -> CombinedLoader:
    loaders = {name: DataLoader(Halved(items, k), 4, shuffle=True) for k, name in enumerate(("even", "odd"))}
    return CombinedLoader(loaders, "max_size_cycle")


def stateful(items: Dataset[Item]) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(items, BATCH, shuffle=True)


def stateful_workers(items: Dataset[Item]) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(items, BATCH, shuffle=True, num_workers=1)


def drawn(items: Dataset[Item]) -> DataLoader[Item]:
    weights = torch.arange(1.0, ROWS + 1).square()
    return DataLoader(items, BATCH, sampler=WeightedRandomSampler(weights, 2 * ROWS))


def ragged(items: Dataset[Item]) -> DataLoader[Item]:
    return DataLoader(items, batch_sampler=Ragged())


def working(items: Dataset[Item]) -> DataLoader[Item]:
    return DataLoader(items, BATCH, shuffle=True, num_workers=2)


def persisting(items: Dataset[Item]) -> DataLoader[Item]:
    return DataLoader(items, BATCH, shuffle=True, num_workers=1, persistent_workers=True)


def out_of_order(items: Dataset[Item]) -> DataLoader[Item]:
    return DataLoader(items, BATCH, shuffle=True, num_workers=2, in_order=False)


class Scaled(Classifier):
    """Preprocessing of each row in a hook of its own."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 0.5, *batch[1:]]

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch if self._trainer is not None else [batch[0] * 0.5, *batch[1:]])


class Mixup(Classifier):
    """A row and its neighbour in the batch; the reference calls ``loss`` alone."""

    in_loss = False

    def mixed(self, batch: Any) -> Any:
        return [0.7 * batch[0] + 0.3 * batch[0].roll(1, 0), *batch[1:]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.mixed(batch) if self.trainer.training else batch

    def loss(self, batch: Any) -> Tensor:
        return super().loss(self.mixed(batch) if self.in_loss and self.training else batch)


class Noisy(Classifier):
    """Draws random numbers in ``training_step``, whatever the mode, as diffusion models do."""

    in_loss = False  # the reference calls ``loss`` alone

    def _shifted(self, batch: Any) -> Any:
        return [batch[0] + 0.3 * torch.randn_like(batch[0]), *batch[1:]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(self._shifted(batch), batch_idx)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(self._shifted(batch) if self.in_loss and self.training else batch)


ROWS_TOLD = {"row_fn": lambda batch: batch[2], "num_rows": ROWS}
DATA = [
    Regime(
        "batches of changing sizes",
        "data",
        data=lambda: vectors(ragged),
    ),
    Regime("weighted sampler with repetitions", "data", data=lambda: vectors(drawn)),
    Regime("workers", "data", data=lambda: vectors(working)),
    Regime("persistent workers", "data", data=lambda: vectors(persisting)),
    Regime(
        "iterable dataset with row_fn",
        "data",
        data=lambda: vectors(lambda items: DataLoader(Stream(items), BATCH)),
        influence=ROWS_TOLD,
    ),
    Regime(
        "batch_size=None with row_fn",
        "data",
        data=lambda: vectors(lambda items: DataLoader(Ready(items), batch_size=None, shuffle=True)),
        influence=ROWS_TOLD,
    ),
    Regime(
        "CombinedLoader with row_fn",
        "data",
        Both,
        lambda: Data(**{**vectors(combined).__dict__, "rows_of": rows_of_both}),
        influence={"row_fn": rows_of_both, "num_rows": ROWS},
        note="no part of a batch has its 8 rows",
    ),
    Regime("StatefulDataLoader", "data", data=lambda: vectors(stateful), needs="torchdata"),
    Regime("StatefulDataLoader, workers", "data", data=lambda: vectors(stateful_workers), needs="torchdata", slow=True),
    Regime("batch as a dict", "data", Named, lambda: vectors(collate=as_dict, rows_of=itemgetter("row"))),
    Regime("batch that the step changes", "data", Changes, lambda: vectors(collate=as_dict, rows_of=itemgetter("row"))),
    Regime("batch as a tuple", "data", Classifier, lambda: vectors(collate=as_tuple)),
    Regime("batch as a dataclass", "data", FromFields, lambda: vectors(collate=as_fields, rows_of=attrgetter("row"))),
    Regime("batch as a Mapping", "data", Named, lambda: vectors(collate=as_mapping, rows_of=itemgetter("row"))),
    Regime("preprocessing in on_after_batch_transfer", "data", Scaled),
    Regime(
        "random numbers drawn in training_step",
        "data",
        Noisy,
        shares="among",
        plain_form=lambda module: setattr(module, "in_loss", True),
    ),
    Regime(
        "mixup in on_after_batch_transfer (scores of mixtures)",
        "data",
        Mixup,
        shares="among",
        plain_form=lambda module: setattr(module, "in_loss", True),
        note="Mixup.on_after_batch_transfer mixes the rows of a batch",
    ),
]
