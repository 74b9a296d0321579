"""Training data whose batches hold their rows' numbers, and a training that notes them beside the rows recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from ine_callback import FINE, InfluenceCallback

N = 22


class Numbered(Dataset[Any]):
    """Rows (x, number): the batch itself says which rows it holds."""

    def __init__(self, start: int = 0, size: int = N) -> None:
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(start))
        self.start = start

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.start + int(index)


class AtOnce(Numbered):
    """Fetches a whole batch in one call."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        return [self[k] for k in indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)


class Backwards(Sampler[Any]):
    """Yields other kinds of integers, last row first."""

    def __init__(self, size: int, kind: Callable[[int], Any]) -> None:
        self.size, self.kind = size, kind

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return iter([self.kind(k) for k in range(self.size - 1, -1, -1)])


class Ragged(Sampler[list[int]]):
    """Batches of different sizes."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[3, 1, 2], [0, 21], [5, 6, 7, 8, 9], [4, 4, 20]])


def as_dict(items: list[tuple[Tensor, int]]) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in items]), "number": torch.tensor([k for _, k in items])}


class RecordedRows(FINE):
    """f-INE that also keeps the rows of every recorded batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []

    def update(self, rows: Tensor, *args: Any, **kwargs: Any) -> None:
        self.batches.append(rows.tolist())
        super().update(rows, *args, **kwargs)


class Tiny(L.LightningModule):
    """Notes the numbers of every training batch, and the dataset its loader shows meanwhile."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.layer, self.fail_at = nn.Linear(3, 1), fail_at
        self.numbers: list[list[int]] = []
        self.datasets: list[Any] = []
        self.val: list[Any] = []

    def training_step(self, batch: Any) -> Tensor:
        batch = batch["a"] if isinstance(batch, dict) and "a" in batch else batch
        x, number = (batch["x"], batch["number"]) if isinstance(batch, dict) else batch
        self.numbers.append(number.tolist())
        loader = self.trainer.train_dataloader
        self.datasets.append(getattr(loader, "dataset", None))
        if len(self.numbers) == self.fail_at:
            raise ZeroDivisionError("the user's own")
        return self.layer(x).square().mean()

    def validation_step(self, batch: Any) -> Tensor:
        self.val.append(type(batch))
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    loader: Any, epochs: int = 2, module: Tiny | None = None, callback: InfluenceCallback | None = None, **options: Any
) -> tuple[Tiny, RecordedRows]:
    module, recorded = module or Tiny(), RecordedRows()
    callback = callback or InfluenceCallback("self", methods=[recorded], on_error="raise")
    val = options.pop("val", None)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **options,
    )
    trainer.fit(module, loader, val)
    return module, recorded


DATA = Numbered()


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "sequential": lambda: DataLoader(DATA, batch_size=4),
    "shuffle": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "drop-last": lambda: DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "out-of-order": lambda: DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2, in_order=False),
    "weighted": lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), N)),
    "replacement": lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, replacement=True, num_samples=9)),
    "custom-sampler": lambda: DataLoader(DATA, batch_size=4, sampler=Backwards(N, int)),
    "tensor-indices": lambda: DataLoader(DATA, batch_size=4, sampler=Backwards(N, torch.tensor)),
    "numpy-indices": lambda: DataLoader(DATA, batch_size=4, sampler=Backwards(N, np.int32)),
    "batch-sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, drop_last=False)),
    "ragged-batch-sampler": lambda: DataLoader(DATA, batch_sampler=Ragged(), num_workers=1),
    "subset": lambda: DataLoader(Subset(DATA, [7, 3, 19, 4, 0, 11]), batch_size=2, shuffle=True),
    "concat": lambda: DataLoader(ConcatDataset([DATA, Numbered(100, 7)]), batch_size=4, shuffle=True),
    "getitems": lambda: DataLoader(AtOnce(), batch_size=4, shuffle=True),
    "getitems-workers": lambda: DataLoader(AtOnce(), batch_size=4, shuffle=True, num_workers=2),
    "subset-of-getitems": lambda: DataLoader(Subset(AtOnce(), [5, 2, 8, 1]), batch_size=2, shuffle=True),
    "tensor-dataset": lambda: DataLoader(TensorDataset(torch.randn(N, 3), torch.arange(N)), batch_size=4, shuffle=True),
    "stack-dataset": lambda: DataLoader(StackDataset(torch.randn(N, 3), torch.arange(N)), batch_size=4, shuffle=True),
    "random-split": lambda: DataLoader(torch.utils.data.random_split(DATA, [10, 12])[0], batch_size=4, shuffle=True),
    "own-collate": lambda: DataLoader(DATA, batch_size=4, shuffle=True, collate_fn=as_dict),
    "own-collate-workers": lambda: DataLoader(DATA, batch_size=4, shuffle=True, collate_fn=as_dict, num_workers=2),
    "one-row": lambda: DataLoader(DATA, batch_size=1, shuffle=True),
    "generator": lambda: DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
}
