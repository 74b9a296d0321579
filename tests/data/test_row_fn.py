"""Training data whose rows the loader cannot tell: named by ``row_fn``, or refused before training with that remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_row_ids import DATA, LOADERS, N, Tiny, Told, fit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ine_callback import InfluenceCallback
from ine_callback.data.row_ids import RowTracker
from ine_callback.errors import RowsError


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.randn(3), k) for k in range(10)])


def test_row_fn_names_the_rows_of_a_stream() -> None:
    told = Told()
    callback = InfluenceCallback("self", methods=[told], row_fn=lambda batch: batch[1], num_rows=10, on_error="raise")
    module, _ = fit(DataLoader(Stream(), batch_size=4), callback=callback)
    assert module.numbers == told.told == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert callback.report is not None and callback.report.rows == 10


def test_row_fn_comes_before_the_loader() -> None:
    told = Told()
    callback = InfluenceCallback("self", methods=[told], row_fn=lambda batch: N - 1 - batch[1], on_error="raise")
    module, _ = fit(LOADERS["shuffle"](), callback=callback)
    assert [[N - 1 - k for k in numbers] for numbers in module.numbers] == told.told


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


def test_indices_that_are_no_integers_do_not_end_training() -> None:
    """A dataset with string keys: the recording stops with a remedy, the training goes on."""

    class Keyed(Dataset[Any]):
        def __getitem__(self, key: str) -> tuple[Tensor, int]:
            return torch.ones(3), len(key)

        def __len__(self) -> int:
            return 4

    loader = DataLoader(Keyed(), batch_size=2, sampler=["a", "bb", "ccc", "dddd"])
    with pytest.warns(UserWarning, match="row_fn"):
        module, _ = fit(loader, callback=InfluenceCallback("self"))
    assert module.numbers == [[1, 2], [3, 4]] * 2


def test_rows_that_do_not_fit_the_batch_stop_only_the_recording() -> None:
    """A collate function that drops rows."""
    loader = DataLoader(DATA, batch_size=4, collate_fn=lambda items: torch.utils.data.default_collate(items[:3]))
    with pytest.warns(UserWarning, match="InfluenceCallback: recording stopped"):
        module, _ = fit(loader, callback=InfluenceCallback("self"))
    assert len(module.numbers) == 12


def test_two_views_of_each_row_are_not_taken_for_tokens() -> None:
    """Twice as many rows as indices, all first views before all second ones: the shape alone says two tokens a row."""

    def views(items: list[tuple[Tensor, int]]) -> list[Tensor]:
        x = torch.stack([x for x, _ in items])
        return [torch.cat([x, -x]), torch.tensor([k for _, k in items]).repeat(2)]

    with pytest.warns(UserWarning, match="not led by the batch's 4 rows"):
        fit(DataLoader(DATA, batch_size=4, collate_fn=views), callback=InfluenceCallback("self"))


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
