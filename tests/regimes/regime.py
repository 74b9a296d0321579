"""What a regime is: a module, its data and the Trainer's options, all made anew for every run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

ROWS, BATCH, EPOCHS = 20, 6, 3  # a last batch of two rows
FEATURES, CLASSES = 5, 3

Item = tuple[Tensor, Tensor, int]  # input, target, row


class Items(Dataset[Item]):
    """Rows that know their own number, so that every batch says which rows it holds."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Item:
        return self.x[row], self.y[row], int(row)


@dataclass
class Data:
    """What a run reads.

    Attributes:
        train: Given to ``fit``.
        items: The training rows by their number, for the reference.
        val: One batch, the query ``val``.
        collate: Makes a batch of items.
        rows_of: The rows of a batch as ``training_step`` sees it.
    """

    train: Any
    items: Dataset[Any]
    val: DataLoader[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    rows_of: Callable[[Any], Any] = lambda batch: batch[2]


def vectors(
    make: Callable[[Dataset[Any]], Any] | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    rows_of: Callable[[Any], Any] = lambda batch: batch[2],
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]] | None = None,
) -> Data:
    """Random rows of features and classes, shuffled with a short last batch unless ``make`` says otherwise."""
    generator = torch.Generator().manual_seed(3)
    draw = draw or features
    items, held_out = Items(*draw(generator, ROWS)), Items(*draw(generator, 8))
    train = make(items) if make else DataLoader(items, BATCH, shuffle=True, collate_fn=collate)
    return Data(train, items, DataLoader(held_out, 8, collate_fn=collate), collate, rows_of)


def features(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, FEATURES, generator=generator), classes(generator, rows)


def classes(generator: torch.Generator, rows: int) -> Tensor:
    return torch.randint(CLASSES, (rows,), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


class Classifier(L.LightningModule):
    """Cross entropy of a network, logged; ``loss`` is what the reference calls for single rows.

    Args:
        net: The network.
        optimizer: Makes the optimizer of the parameters.
        schedule: Makes Lightning's scheduler entry of the optimizer, if there is one.

    Attributes:
        clip: Norm to which it clips gradients by hand, those of each optimizer by themselves.
    """

    clip: float | None = None

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self._optimizer, self._schedule = net or mlp(), optimizer, schedule

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def terms(self, single: Any) -> int:
        """How many terms of the mean loss a row has: 1, or its tokens."""
        return 1

    def of_no_row(self) -> Tensor | None:
        """What the training loss holds beside the rows' losses."""
        return None

    def after_step(self, steps: int) -> None:
        """What the training changes after its so many optimizer steps; the reference does the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, penalty = self.loss(batch), self.of_no_row()
        loss = loss if penalty is None else loss + penalty
        self.log("train", loss, on_step=True, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val", loss, batch_size=1)
        return loss

    def parameters_to_train(self) -> Iterable[Any]:
        return [p for p in self.parameters() if p.requires_grad]

    def made_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._optimizer(self.parameters_to_train())]

    def configure_optimizers(self) -> Any:
        optimizer, *others = self.made_optimizers()
        if others:
            return [optimizer, *others]
        if self._schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer)}


@dataclass
class Regime:
    """One way to train.

    Attributes:
        name: Its row of the table.
        group: The table's section.
        module: Makes the module; its first weights must depend on the seed alone.
        data: Makes the data.
        trainer: Makes the Trainer's options.
        influence: Options of the callback.
        shares: How the reference takes a row's share: from a pass of the row ``alone``, or ``among`` its batch-mates
            (dropout, BatchNorm).
        plain_form: Turns the reference's module into an equal one that single gradients can be taken of.
        tolerance: Largest relative error of a query's scores, |found - reference| / |reference| over all rows.
        dtype: Of the reference.
        left_out: Parameters that the report must name as left out; the reference leaves them out too.
        approximate: Modules that the report must name as approximate.
        unfamiliar: Numbers of batches that use parameters as none before, and so are left out.
        note: Words that the report's notes must hold.
        processes: How many train together; with more than one the Trainer's strategy is "ddp_fork".
        slow: Left out of the default tests.
        needs: Package that it needs.
        supported: Tells whether torch can run it on this machine.
    """

    name: str
    group: str
    module: Callable[[], Classifier] = Classifier
    data: Callable[[], Data] = vectors
    trainer: Callable[[], dict[str, Any]] = dict
    influence: dict[str, Any] = field(default_factory=dict)
    shares: Literal["alone", "among"] = "alone"
    plain_form: Callable[[Any], object] = lambda module: None
    tolerance: float = 1e-4
    dtype: torch.dtype = torch.float32
    left_out: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    unfamiliar: tuple[int, ...] = ()
    note: str = ""
    processes: int = 1
    slow: bool = False
    needs: str | None = None
    supported: Callable[[], bool] = lambda: True

    def lacks(self) -> str:
        """What this machine lacks to run it; empty: nothing."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return "" if self.supported() else "torch cannot run it on this processor"


def converted(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in the reference's dtype."""
    return apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)
