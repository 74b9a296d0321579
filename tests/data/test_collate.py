"""Which item each row of a collated batch is: exact for any collate function, or said that it cannot be told."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

from ine_callback import InfluenceCallback
from ine_callback.data.collate import Followed
from ine_callback.errors import RowsError
from tests.helpers.numbered_rows import RecordedRows

Item = tuple[int, Tensor, int]  # number (no collate function below puts it into the batch), sequence, label
TRUE: list[list[int]] = []  # the numbers in each batch's order, as the collate function had them


def items(count: int, seed: int = 0) -> list[Item]:
    dice = torch.Generator().manual_seed(100 * seed + count)
    lengths = torch.randint(2, 9, (count,), generator=dice).tolist()
    return [(k, torch.randn(n, 4, generator=dice), n % 3) for k, n in enumerate(lengths)]


def told(batch: list[Item]) -> list[Item]:
    TRUE.append([number for number, _, _ in batch])
    return batch


def padded(batch: list[Item]) -> tuple[Tensor, Tensor, Tensor]:
    xs = [x for _, x, _ in told(batch)]
    return pad_sequence(xs, batch_first=True), torch.tensor([y for _, _, y in batch]), torch.tensor([*map(len, xs)])


def longest_first(batch: list[Item]) -> Any:
    return padded(sorted(batch, key=lambda item: -len(item[1])))


def sorts_in_place(batch: list[Item]) -> Any:
    batch.sort(key=lambda item: item[2])
    return padded(batch)


def tells_its_order(batch: list[Item]) -> Any:
    x, y, lengths = padded(batch)
    order = lengths.argsort(descending=True, stable=True)
    TRUE[-1] = [batch[int(k)][0] for k in order]
    return {"x": x[order], "y": y[order], "order": order}


def shuffles(batch: list[Item]) -> Any:
    random.shuffle(batch)
    return padded(batch)


def drops(batch: list[Item]) -> Any:
    return padded([item for item in batch if len(item[1]) > 3] or batch[:1])


def masks(batch: list[Item]) -> Any:
    x, y, _ = padded(batch)
    return {"x": torch.where(torch.rand(x.shape) < 0.3, 0.0, x), "y": y}


def packs(batch: list[Item]) -> Any:
    return pack_sequence([x for _, x, _ in told(batch)], enforce_sorted=False), torch.tensor([y for _, _, y in batch])


def time_first(batch: list[Item]) -> Any:
    return pad_sequence([x for _, x, _ in told(batch)]), torch.tensor([y for _, _, y in batch])


def joined(batch: list[Item]) -> Any:
    xs = [x for _, x, _ in told(batch)]
    return torch.cat(xs), torch.tensor([0, *map(len, xs[:-1])]).cumsum(0), torch.tensor([y for _, _, y in batch])


def lists(batch: list[Item]) -> Any:
    return [x for _, x, _ in told(batch)], [{"label": torch.tensor(y)} for _, _, y in batch]


def normalised(batch: list[Item]) -> Any:
    x, y, _ = padded(batch)
    return (x - x.mean()) / x.std(), y


def words(batch: list[Item]) -> Any:
    return {"text": [f"{float(x.sum()):.6f}" for _, x, _ in told(batch)], "y": np.array([y for _, _, y in batch])}


@dataclass
class Fields:
    x: Tensor
    y: Tensor


def fields(batch: list[Item]) -> Any:
    x, y, _ = padded(sorted(batch, key=lambda item: len(item[1])))
    return Fields(x.transpose(1, 2), F.one_hot(y, 3))


class Plain:
    """An object of no known kind."""

    def __init__(self, batch: list[Item]) -> None:
        self.x, self.y, _ = padded(batch[::-1])


def two_views(batch: list[Item]) -> Any:
    x, y, _ = padded(batch)
    TRUE[-1] = TRUE[-1] * 2
    return torch.cat([x, -x]), y.repeat(2)


def with_one_twice(batch: list[Item]) -> Any:
    return padded([*batch, batch[0]])


FOLLOWED = [padded, longest_first, sorts_in_place, tells_its_order, shuffles, drops, masks, packs, time_first, joined]
FOLLOWED += [lists, normalised, words, fields, Plain, two_views]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("collate", FOLLOWED, ids=lambda f: f.__name__)
def test_rows_are_the_items_that_they_hold(collate: Callable[[Any], Any], count: int) -> None:
    followed = Followed(collate)
    for seed in range(3):
        TRUE.clear()
        batch = items(count, seed)
        state = torch.get_rng_state(), random.getstate()
        expected = collate(list(batch))
        after = torch.get_rng_state(), random.getstate()
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        TRUE.clear()
        made, fate = followed(list(batch))
        assert torch.equal(torch.get_rng_state(), after[0]) and random.getstate() == after[1]
        assert len(TRUE) == 1 and type(made) is type(expected)
        assert fate.places == TRUE[0], fate.reason


def mixup(batch: list[Item]) -> Any:
    x, y, _ = padded(batch)
    order, share = torch.randperm(len(y)), torch.rand(())
    TRUE[-1] = order.tolist()
    return share * x + (1 - share) * x[order], y, y[order], share


def cutmix(batch: list[Item]) -> Any:
    x, y, _ = padded(batch)
    TRUE[-1] = [1, 0]
    return torch.cat([x[:, :1], x.roll(1, 0)[:, 1:]], 1), y


def mixes_labels(batch: list[Item]) -> Any:
    x, _, _ = padded(batch)
    TRUE[-1] = [1, 0]
    return x, x.sum((1, 2)).flip(0)


def sorts_and_masks(batch: list[Item]) -> Any:
    x, y, _ = padded(sorted(batch, key=lambda item: -len(item[1])))
    return torch.where(torch.rand(x.shape) < 0.3, 0.0, x), y


@pytest.mark.parametrize("collate", [mixup, cutmix, mixes_labels, sorts_and_masks], ids=lambda f: f.__name__)
def test_mixtures_are_never_taken_for_rows(collate: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    refused = 0
    for seed in range(60):
        TRUE.clear()
        _, fate = Followed(collate)(items(2 + seed % 9, seed))
        assert fate.places is None or TRUE[0] == sorted(TRUE[0]) == fate.places
        refused += fate.places is None
        assert fate.places is not None or "mixup" in fate.reason
    assert refused > 30


def test_a_row_that_is_no_item_is_said_so() -> None:
    """The usual way to fill a batch up after broken items: others are drawn in their place."""

    def refills(batch: list[Item]) -> Any:
        return padded([item if item[2] else (99, torch.rand(3, 4), 1) for item in batch])

    _, fate = Followed(refills)(items(8))
    assert fate.places is None and "refills" in fate.reason
    _, fate = Followed(with_one_twice)(items(8))
    assert fate.places is None and "with_one_twice makes 9 rows of 8 items" in fate.reason


# -- in training ------------------------------------------------------------------------------------------------------


class Sequences(Dataset[Any]):
    """Sequences of different lengths; ``broken`` ones are None."""

    def __init__(self, broken: tuple[int, ...] = (), at_once: bool = False) -> None:
        self.items, self.broken = items(24), broken
        if at_once:
            self.__getitems__ = lambda indices: [self[k] for k in indices]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item | None:
        return None if index in self.broken else self.items[index]


class Net(L.LightningModule):
    """Its weights never change, so that a row's mean loss in the report must be the row's own loss."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.first, self.head, self.lr = nn.Linear(4, 8), nn.Linear(8, 3), lr

    def losses(self, batch: Any, **options: Any) -> Tensor:
        x, y, lengths = batch
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        h = (torch.tanh(self.first(x)) * inside[..., None]).sum(1) / lengths[:, None]
        return F.cross_entropy(self.head(h), y, **options)

    def training_step(self, batch: Any) -> Tensor | None:
        return None if batch is None else self.losses(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(module: Net, loader: DataLoader[Any], callbacks: list[Any], **options: Any) -> None:
    L.seed_everything(1, verbose=False)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **quiet, **options).fit(module, loader)


def without_broken(batch: list[Item | None]) -> Any:
    there = [item for item in batch if item is not None]
    return padded(there) if there else None


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "sorted": lambda: DataLoader(Sequences(), 6, shuffle=True, collate_fn=longest_first),
    "fetched at once": lambda: DataLoader(Sequences(at_once=True), 6, shuffle=True, collate_fn=longest_first),
    "dropped": lambda: DataLoader(Sequences((8,)), 6, collate_fn=without_broken),
    "dropped in the first batch": lambda: DataLoader(Sequences((2, 3)), 6, collate_fn=without_broken),
    "forked": lambda: DataLoader(
        Sequences(), 6, True, collate_fn=longest_first, num_workers=2, persistent_workers=True
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_scores_belong_to_the_rows(name: str) -> None:
    torch.manual_seed(0)
    module, loader = Net(), LOADERS[name]()
    callback = InfluenceCallback("self", on_error="raise")
    fit(module, loader, [callback])
    assert callback.report is not None
    data = loader.dataset
    assert isinstance(data, Sequences)
    with torch.no_grad():
        own = [float("nan") if k in data.broken else float(module.losses(padded([data.items[k]]))) for k in range(24)]
    np.testing.assert_allclose(callback.report.scores.mean_loss, own, rtol=1e-5)
    assert not any("left out" in note for note in callback.report.run.notes)


def test_batches_of_which_nothing_is_left_are_skipped() -> None:
    """By Lightning, which trains on no batch that is None."""
    module, callback = Net(0.1), InfluenceCallback("self", on_error="raise")
    fit(module, DataLoader(Sequences(tuple(range(6, 12))), 6, collate_fn=without_broken), [callback])
    assert callback.report is not None and callback.report.run.steps == 6
    assert int(np.isfinite(callback.report.scores.mean_loss).sum()) == 18


@pytest.mark.parametrize(("accumulate", "which"), [(1, 2), (2, 2), (2, 3)])
def test_batches_that_are_mixed_now_and_then(accumulate: int, which: int) -> None:
    """The others are recorded, also where the first or the last one of an accumulated step is left out."""
    calls = [0]

    def sometimes(batch: list[Item]) -> Any:
        x, y, lengths = padded(batch)
        calls[0] += 1
        return (x + x.flip(0), y, lengths) if (calls[0] - 1) % 4 == which else (x, y, lengths)

    recorded = RecordedRows()
    callback = InfluenceCallback("self", methods=[recorded], on_error="raise")
    with pytest.warns(UserWarning, match="sometimes gives rows that depend on other items"):
        fit(Net(0.1), DataLoader(Sequences(), 4, collate_fn=sometimes), [callback], accumulate_grad_batches=accumulate)
    whole = [[*range(k, k + 4)] for k in range(0, 24, 4)] * 2
    kept = [row for k, rows in enumerate(whole) for row in rows if k % 4 != which]
    assert [row for rows in recorded.batches for row in rows] == kept
    assert callback.report is not None and any("3 batches left out" in note for note in callback.report.run.notes)


def test_the_proof_waits_for_a_step_whose_batches_are_all_known() -> None:
    """The first batch of the first accumulated step is left out: its gradients are in ``.grad`` all the same."""
    calls = [0]

    def joins_two_at_first(batch: list[Item]) -> Any:
        x, y, lengths = padded(batch)
        calls[0] += 1
        return (x[1:] + x[:-1], y[1:], lengths[1:]) if calls[0] == 1 else (x, y, lengths)

    recorded = RecordedRows()
    callback = InfluenceCallback("self", methods=[recorded], on_error="raise", uncaptured="raise")
    with pytest.warns(UserWarning, match="joins_two_at_first makes 3 rows of 4 items"):
        fit(Net(0.1), DataLoader(Sequences(), 4, collate_fn=joins_two_at_first), [callback], accumulate_grad_batches=2)
    assert recorded.batches[0] == [*range(8, 16)] and len(recorded.batches) == 5


@pytest.mark.parametrize("collate", [mixup, cutmix], ids=lambda f: f.__name__)
def test_mixing_in_the_collate_function_is_refused_before_the_first_step(collate: Callable[[Any], Any]) -> None:
    module = Net(0.1)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(RowsError, match=rf"InfluenceCallback: the collate function {collate.__name__} .*row_fn="):
        fit(module, DataLoader(Sequences(), 6, collate_fn=collate), [InfluenceCallback("self")])
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


COUNT = 0


def stateful() -> list[Callable[[Any], Any]]:
    """Functions whose next call depends on those before."""
    numbers, drawn = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def of_numpy(batch: list[Item]) -> Any:
        x, y, lengths = padded(batch)
        return x + torch.as_tensor(numbers.normal(size=x.shape), dtype=x.dtype), y, lengths

    def of_torch(batch: list[Item]) -> Any:
        x, y, lengths = padded(batch)
        return x * (torch.rand(x.shape, generator=drawn) < 0.8), y, lengths

    def of_a_global(batch: list[Item]) -> Any:
        global COUNT
        COUNT += 1
        x, y, lengths = padded(batch)
        return x / COUNT + random.random() + float(np.random.rand()), y, lengths

    class Object:
        def __init__(self) -> None:
            self.calls, self.seen = 0, [0]

        def __call__(self, batch: list[Item]) -> Any:
            self.calls += 1
            self.seen.append(self.calls)
            x, y, lengths = padded(batch)
            return x + self.calls + len(self.seen) + torch.randn_like(x), y, lengths

    def in_place(batch: list[Item]) -> Any:
        for _, x, _ in batch:
            x.mul_(0.9)  # the data set's own
        return padded(batch)

    return [of_numpy, of_torch, of_a_global, Object(), in_place]


@pytest.mark.parametrize("which", range(5))
def test_training_does_not_notice_that_the_function_is_called_again(which: int) -> None:
    global COUNT
    weights = []
    for recorded in (False, True):
        COUNT = 0
        L.seed_everything(0, verbose=False)
        module = Net(0.1)
        callbacks = [InfluenceCallback("self", on_error="raise")] if recorded else []
        fit(module, DataLoader(Sequences(), 6, True, collate_fn=stateful()[which]), callbacks)
        weights.append([p.detach() for p in module.parameters()])
        assert not callbacks or callbacks[0].report.run.steps == 8  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_loader_may_hand_the_function_to_a_new_process() -> None:
    """Workers that are spawned get it pickled."""
    followed = pickle.loads(pickle.dumps(Followed(longest_first)))
    TRUE.clear()
    assert followed(items(6))[1].places == TRUE[0]


def test_the_default_function_is_called_once() -> None:
    batch, fate = Followed(default_collate)(items(3)[:1] * 3)
    assert fate.places == [0, 1, 2] and batch[0].tolist() == [0, 0, 0]
