"""Row identities through a real Trainer: what the recorder is told is what ``training_step`` saw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
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


class Attributed(Numbered):
    """Has attributes that user code may ask of ``loader.dataset``."""

    classes = ("a", "b")


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


class Told(FINE):
    """f-INE that also keeps the rows it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[int]] = []

    def update(self, rows: Tensor, *args: Any, **kwargs: Any) -> None:
        self.told.append(rows.tolist())
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
) -> tuple[Tiny, Told]:
    module, told = module or Tiny(), Told()
    callback = callback or InfluenceCallback("self", methods=[told], on_error="raise")
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
    return module, told


def check(loader: DataLoader[Any], module: Tiny, told: Told) -> None:
    """Every row told names the item that the step saw; the loader is the user's again."""
    assert module.numbers and len(module.numbers) == len(told.told)
    for numbers, rows in zip(module.numbers, told.told, strict=True):
        assert [int(loader.dataset[row][1]) for row in rows] == numbers
    check_released(loader)


def check_released(loader: DataLoader[Any]) -> None:
    assert "_get_iterator" not in loader.__dict__
    batch = next(iter(loader))
    assert isinstance(batch, list | dict), type(batch)
    shut_down(loader)


def shut_down(loader: DataLoader[Any]) -> None:
    """Ends persistent workers at once: left to the garbage collector they hang for ten seconds."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


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


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_rows_told_are_the_rows_seen(make: Callable[[], DataLoader[Any]]) -> None:
    loader = make()
    dataset, collate = loader.dataset, loader.collate_fn
    module, told = fit(loader)
    check(loader, module, told)
    assert loader.dataset is dataset and loader.collate_fn is collate
    assert all(shown is dataset for shown in module.datasets)


@pytest.mark.long
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_of_other_start_methods(context: str) -> None:
    loader = DataLoader(AtOnce(), batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=context)
    check(loader, *fit(loader, epochs=1))


@pytest.mark.parametrize("name", ["shuffle", "workers", "weighted", "generator", "batch-sampler"])
def test_data_order_is_that_of_a_plain_run(name: str) -> None:
    seen = []
    for enabled in (True, False):
        L.seed_everything(5)
        module, _ = fit(LOADERS[name](), callback=InfluenceCallback("self", enabled=enabled, on_error="raise"))
        seen.append(module.numbers)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["shuffle", "persistent"])
def test_one_loader_for_training_and_validation(name: str) -> None:
    loader = LOADERS[name]()
    module, told = fit(loader, val=loader)
    check(loader, module, told)
    assert set(module.val) == {list}


@pytest.mark.parametrize("name", ["shuffle", "persistent", "own-collate"])
def test_a_second_fit_with_the_same_loader(name: str) -> None:
    loader = LOADERS[name]()
    check(loader, *fit(loader))
    check(loader, *fit(loader))
    module, _ = fit(loader, callback=InfluenceCallback("self", enabled=False))
    assert module.numbers


def test_a_loader_whose_workers_already_run() -> None:
    """A look at the first batch, then the fit: persistent workers still know the plain dataset."""
    loader = LOADERS["persistent"]()
    next(iter(loader))
    check(loader, *fit(loader))


def test_a_second_fit_with_the_same_callback() -> None:
    told = Told()
    callback = InfluenceCallback("self", methods=[told], on_error="raise")
    for make in (LOADERS["shuffle"], LOADERS["subset"]):
        loader = make()
        told.told.clear()
        module, _ = fit(loader, callback=callback)
        check(loader, module, told)
        assert callback.report is not None and callback.report.rows == len(loader.dataset)


@pytest.mark.parametrize("wrap", [lambda loader: [loader], lambda loader: {"a": loader}], ids=["list", "dict"])
def test_one_loader_in_a_collection(wrap: Callable[[Any], Any]) -> None:
    loader = LOADERS["shuffle"]()

    class Unwrapping(Tiny):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch[0] if len(batch) == 1 and isinstance(batch, list) else batch)

    check(loader, *fit(wrap(loader), module=Unwrapping()))


def test_two_loaders_are_refused_and_given_back() -> None:
    loaders = {"a": LOADERS["shuffle"](), "b": LOADERS["sequential"]()}
    module = Tiny()
    with pytest.raises(ValueError, match=r"InfluenceCallback: 2 training loaders .*row_fn"):
        fit(loaders, module=module)
    assert not module.numbers
    for loader in loaders.values():
        check_released(loader)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 2},
        {"num_sanity_val_steps": 0},
    ],
    ids=str,
)
def test_trainer_options(options: dict[str, Any]) -> None:
    loader = LOADERS["shuffle"]()
    module, told = fit(loader, val=LOADERS["sequential"](), **options)
    numbers, rows = [*itertools.chain(*module.numbers)], [*itertools.chain(*told.told)]
    assert numbers and numbers == rows
    check_released(loader)


def test_loaders_made_anew_every_epoch() -> None:
    made: list[DataLoader[Any]] = []

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            made.append(LOADERS["shuffle"]())
            return made[-1]

    module, told = fit(Data(), epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(made) == 3
    assert module.numbers == told.told
    for loader in made:
        check_released(loader)


@pytest.mark.parametrize("name", ["shuffle", "persistent"])
def test_the_loader_comes_back_after_an_exception(name: str) -> None:
    loader = LOADERS[name]()
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        fit(loader, module=Tiny(fail_at=3))
    check_released(loader)
    check(loader, *fit(loader))


def test_dataset_attributes_are_seen_through_the_wrapper() -> None:
    """A collate function or worker init that asks the dataset finds the user's attributes, in workers too."""

    def init(worker: int) -> None:
        info = torch.utils.data.get_worker_info()
        assert info is not None and info.dataset.classes == ("a", "b")

    loader = DataLoader(Attributed(), batch_size=4, num_workers=1, worker_init_fn=init)
    check(loader, *fit(loader, epochs=1))
