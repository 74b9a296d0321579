"""Training data whose rows the loader cannot tell: named by ``row_fn``, or refused before training with that remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ine_callback import InfluenceCallback
from ine_callback.data.row_ids import RowTracker
from ine_callback.errors import RowsError
from tests.helpers.numbered_rows import DATA, LOADERS, N, RecordedRows, Tiny, fit


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.randn(3), k) for k in range(10)])


def test_row_fn_names_the_rows_of_a_stream() -> None:
    recorded = RecordedRows()
    callback = InfluenceCallback(
        "self", methods=[recorded], row_fn=lambda batch: batch[1], num_rows=10, on_error="raise"
    )
    module, _ = fit(DataLoader(Stream(), batch_size=4), callback=callback)
    assert module.numbers == recorded.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert callback.report is not None and callback.report.rows == 10


def test_row_fn_comes_before_the_loader() -> None:
    recorded = RecordedRows()
    callback = InfluenceCallback("self", methods=[recorded], row_fn=lambda batch: N - 1 - batch[1], on_error="raise")
    module, _ = fit(LOADERS["shuffle"](), callback=callback)
    assert [[N - 1 - k for k in numbers] for numbers in module.numbers] == recorded.batches


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "iterable dataset Stream"),
        (lambda: [(torch.randn(4, 3), torch.arange(4))], "does not tell its rows"),
        (lambda: DataLoader([(torch.randn(4, 3), torch.arange(4))], batch_size=None), "batch_size=None"),
    ],
    ids=["stream", "list-of-batches", "no-batch-size"],
)
def test_loaders_without_rows_are_refused_before_training(make: Callable[[], Any], words: str) -> None:
    module = Tiny()
    with pytest.raises(RowsError, match=rf"InfluenceCallback: .*{words}.*row_fn=lambda batch"):
        fit(make(), module=module, callback=InfluenceCallback("self"))
    assert not module.numbers


def test_indices_that_are_no_integers_are_refused() -> None:
    """A dataset with string keys."""

    class Keyed(Dataset[Any]):
        def __getitem__(self, key: str) -> tuple[Tensor, int]:
            return torch.ones(3), len(key)

        def __len__(self) -> int:
            return 4

    module = Tiny()
    loader = DataLoader(Keyed(), batch_size=2, sampler=["a", "bb", "ccc", "dddd"])
    with pytest.raises(RowsError, match=r"names rows by values of type str.*row_fn="):
        fit(loader, module=module, callback=InfluenceCallback("self"))
    assert not module.numbers


def test_rows_that_do_not_fit_a_batch_leave_only_this_batch_out() -> None:
    recorded, calls = RecordedRows(), []

    def row_fn(batch: Any) -> Tensor:
        calls.append(1)
        return batch[1][:2] if len(calls) == 4 else batch[1]  # once before training: does it name items by their index?

    callback = InfluenceCallback("self", methods=[recorded], row_fn=row_fn, on_error="raise")
    with pytest.warns(UserWarning, match="2 rows were named for a batch of 4"):
        module, _ = fit(DataLoader(DATA, batch_size=4), callback=callback)
    assert recorded.batches == module.numbers[:2] + module.numbers[3:]
    assert callback.report is not None
    assert any(note.startswith("1 batch left out: 2 rows were named") for note in callback.report.run.notes)


def test_two_views_of_each_row_are_visits_of_the_same_row() -> None:
    """Twice as many rows as items, all first views before all second ones."""

    def views(items: list[tuple[Tensor, int]]) -> list[Tensor]:
        x = torch.stack([x for x, _ in items])
        return [torch.cat([x, -x]), torch.tensor([k for _, k in items]).repeat(2)]

    loader = DataLoader(DATA, batch_size=4, collate_fn=views, shuffle=True)
    module, recorded = fit(loader)
    assert module.numbers == recorded.batches


class Graphs:
    """A batch of torch_geometric's kind: an object that moves itself."""

    def __init__(self, items: list[tuple[Tensor, int]]) -> None:
        self.x, self.number = torch.stack([x for x, _ in items]), torch.tensor([k for _, k in items])

    def to(self, *args: Any, **kwargs: Any) -> Graphs:
        return self


class OnObjects(Tiny):
    def training_step(self, batch: Graphs) -> Tensor:
        return super().training_step([batch.x, batch.number])

    def validation_step(self, batch: Graphs) -> Tensor:
        return self.layer(batch.x).square().mean()


@pytest.mark.parametrize("named", [True, False])
def test_batches_of_an_unknown_class(named: bool) -> None:
    loader = DataLoader(DATA, batch_size=4, collate_fn=Graphs, shuffle=True)
    recorded = RecordedRows()
    options: dict[str, Any] = {"row_fn": lambda batch: batch.number} if named else {}
    queries: Any = {"self": "self", "data": loader}
    callback = InfluenceCallback(queries, methods=[recorded], on_error="raise", **options)
    module, _ = fit(loader, module=OnObjects(), callback=callback)
    assert module.numbers == recorded.batches
    assert callback.report is not None
    assert any("no part of a batch has its" in note for note in callback.report.run.notes)


def test_tracker_on_its_own() -> None:
    tracker, loader = RowTracker("Test"), LOADERS["custom-sampler"]()
    tracker.track(loader)
    assert tracker.size == N
    batches = list(loader)
    plain = tracker.strip(batches[0])
    assert tracker.rows.tolist() == plain[1].tolist() == [21, 20, 19, 18]
    assert batches[0].pin_memory.__self__ is batches[0]
    other = object()
    assert tracker.strip(other) is other
    tracker.release()
    assert isinstance(next(iter(loader)), list)
