"""Row identities through a real Trainer: what the recorder gets is what ``training_step`` saw."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
)

from ine_callback import InfluenceCallback
from tests.helpers.numbered_rows import LOADERS, AtOnce, Numbered, RecordedRows, Tiny, fit


class Attributed(Numbered):
    """Has attributes that user code may ask of ``loader.dataset``."""

    classes = ("a", "b")


def check(loader: DataLoader[Any], module: Tiny, recorded: RecordedRows) -> None:
    """Every recorded row names the item that the step saw; the loader is the user's again."""
    assert module.numbers and len(module.numbers) == len(recorded.batches)
    for numbers, rows in zip(module.numbers, recorded.batches, strict=True):
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


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_rows_told_are_the_rows_seen(make: Callable[[], DataLoader[Any]]) -> None:
    loader = make()
    dataset, collate = loader.dataset, loader.collate_fn
    module, recorded = fit(loader)
    check(loader, module, recorded)
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
    module, recorded = fit(loader, val=loader)
    check(loader, module, recorded)
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
    recorded = RecordedRows()
    callback = InfluenceCallback("self", methods=[recorded], on_error="raise")
    for make in (LOADERS["shuffle"], LOADERS["subset"]):
        loader = make()
        recorded.batches.clear()
        module, _ = fit(loader, callback=callback)
        check(loader, module, recorded)
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
    module, recorded = fit(loader, val=LOADERS["sequential"](), **options)
    numbers, rows = [*itertools.chain(*module.numbers)], [*itertools.chain(*recorded.batches)]
    assert numbers and numbers == rows
    check_released(loader)


def test_loaders_made_anew_every_epoch() -> None:
    made: list[DataLoader[Any]] = []

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            made.append(LOADERS["shuffle"]())
            return made[-1]

    module, recorded = fit(Data(), epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(made) == 3
    assert module.numbers == recorded.batches
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
