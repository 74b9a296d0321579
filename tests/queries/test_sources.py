"""Where queries get their data: sampled, noted, drawn without touching the generators, refused with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ine_callback.errors import QueryError
from ine_callback.queries import LossQuery
from ine_callback.queries.sources import DataSource

X, Y = torch.randn(11, 4), torch.arange(11) % 3
DATA = TensorDataset(X, Y)


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def test_large_loaders_are_sampled_and_it_is_noted() -> None:
    loader = DataLoader(TensorDataset(torch.arange(500.0)), batch_size=7)
    source = DataSource("Test", loss, limit=100)
    rows = torch.cat([batch[0] for batch in source.batches(loader)]).long()
    assert len(rows) == len(rows.unique()) == 100 and rows.float().mean() == pytest.approx(250, abs=50)
    assert source.notes == ["query data 'DataLoader': a random 100 of 500 rows"]
    torch.rand(3)  # the sample is the same whatever was drawn before
    again = torch.cat([b[0] for b in DataSource("Test", loss, limit=100).batches(loader)]).long()
    assert torch.equal(rows, again)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x, y) for x, y in zip(X, Y, strict=True)] * 10)


def test_streams_are_read_up_to_the_limit_and_it_is_noted() -> None:
    source = DataSource("Test", loss, limit=10)
    batches = source.batches(DataLoader(Stream(), batch_size=4))
    assert sum(len(b[0]) for b in batches) == 12
    assert source.notes == ["query data 'DataLoader': its first 12 rows"]


def test_reading_data_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    DataSource("Test", loss).batches(DataLoader(DATA, batch_size=2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(Dataset[Any]):
    """Augments with a generator of its own, as its collate function does."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return X[row] + torch.rand(4, generator=self.generator), Y[row]


@pytest.mark.parametrize("read", ["val", [0, 3], "training"])
def test_reading_data_leaves_no_trace_in_generators_of_datasets_and_collate_functions(read: Any) -> None:
    generator, calls = torch.Generator().manual_seed(1), [0]

    def collate(items: list[Any]) -> Any:
        calls[0] += 1
        x, y = (torch.stack(part) for part in zip(*items, strict=True))
        return x + torch.rand(4, generator=generator), y

    dataset = Noisy()
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate)
    before = generator.get_state(), dataset.generator.get_state()
    source = DataSource("Test", loss, loader, [loader])
    batch = source.training([0, 3]) if read == "training" else source.batches(read)[0]
    assert not torch.equal(batch[0][0], X[0])
    assert torch.equal(generator.get_state(), before[0]) and torch.equal(dataset.generator.get_state(), before[1])
    assert calls == [0]


def test_two_loaders_of_one_shape_are_not_mixed_up() -> None:
    """Loaders that live one after the other may get one address."""
    source = DataSource("Test", loss)
    sums = [float(source.batches(DataLoader(TensorDataset(torch.full((3,), float(k)))))[0][0].sum()) for k in range(5)]
    assert sums == [0.0, 3.0, 6.0, 9.0, 12.0]


@pytest.mark.parametrize(
    "data",
    [[], (), {}, DataLoader(TensorDataset(torch.zeros(0, 2))), torch.zeros(0, 3), (X[:0], Y[:0]), iter(())],
    ids=["list", "tuple", "dict", "loader", "tensor", "pair", "iterator"],
)
def test_empty_data_is_refused(data: Any) -> None:
    with pytest.raises(QueryError, match=r"Test: the query's data .* is empty; pass at least one batch"):
        LossQuery(data).bind("q", DataSource("Test", loss))


@pytest.mark.parametrize(
    ("data", "source", "words"),
    [
        ("val", DataSource("Test", loss), "needs a validation loader and there is none; pass val_dataloaders"),
        ("test", DataSource("Test", loss), "'test' is not a data set; the only word known is 'val'"),
        (
            [0, 11],
            DataSource("Test", loss, train=DataLoader(DATA)),
            r"rows \[11\] are not in the training set; .* 0 to 10",
        ),
        ([-1], DataSource("Test", loss, train=DataLoader(DATA)), r"rows \[-1\]"),
        ([0, 1], DataSource("Test", loss), "cannot be indexed; pass a batch"),
        ([0, 1], DataSource("Test", loss, train=DataLoader(Stream())), "cannot be indexed|not in the training set"),
    ],
)
def test_missing_data_is_refused(data: Any, source: DataSource, words: str) -> None:
    with pytest.raises(QueryError, match=f"Test: .*({words})"):
        source.batches(data)


def test_a_missing_loss_is_refused_with_a_remedy() -> None:
    (bound,) = LossQuery((X, Y)).bind("q", DataSource("Test", None))
    with pytest.raises(QueryError, match="Test: a query needs the model's loss; pass loss="):
        bound.value(nn.Linear(4, 3), (X, Y))
