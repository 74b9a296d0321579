"""Processes that train together: real ones over gloo, a bare DDP loop, breakdowns in one of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ine_callback import InfluenceReport, Recorder
from ine_callback.capture import Block, Capture, register_layer
from ine_callback.capture.per_sample_gradients import Vector
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import InfluenceError, UnknownRows
from ine_callback.methods import FINE
from ine_callback.queries import LossQuery
from ine_callback.recording.accumulators import RowAccumulators
from ine_callback.recording.backward import BackwardPasses
from ine_callback.recording.coverage import Coverage
from ine_callback.recording.observations import Pending
from ine_callback.recording.steps import OptimizerSteps
from ine_callback.scoring.signals import Signals
from tests.helpers.accidents import accident
from tests.helpers.identical import unequal
from tests.helpers.once import spawned

ROWS, BATCH, STEPS = 48, 8, 24
# (step, process) whose rows are unknown: in the first step, between refreshes, in a step that refreshes, in both
UNKNOWN = frozenset({(0, 1), (3, 1), (5, 0), (8, 0), (8, 1)})
ROWS_STORED = 40  # rows of a process in the test of the sample alone
PLACES = [
    (BackwardPasses, "start_batch"),
    (BackwardPasses, "see"),
    (BackwardPasses, "receive"),
    (BackwardPasses, "settle"),
    (OptimizerSteps, "end"),
    (RowAccumulators, "update"),
    (Capture, "start_batch"),
    (Coverage, "verify"),
    (Signals, "refresh"),
    (Signals, "_gradients"),
    (KFAC, "observe"),
    (GradientSample, "commit"),
    (Pending, "take"),
    (FINE, "update"),
]
Batch = tuple[Tensor, Tensor]


class Odd(nn.Module):
    """A layer whose function fails in the second process, after so many steps."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.factor, self.left = nn.Parameter(torch.ones(8)), left

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@register_layer(Odd)
def _odd(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Tensor]:
    module.left -= 1
    if module.left < 0 and dist.get_rank() == 1:
        raise ZeroDivisionError("mine")
    return {"factor": a * delta}


class Net(nn.Module):
    """A network; ``more`` lets the first process alone use one more layer, ``odd`` has one that fails in the second."""

    def __init__(self, more: bool = False, odd: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        if odd is not None:
            self.body.insert(2, Odd(odd))
        self.more = nn.Linear(3, 3) if more else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x if self.more is None or dist.get_rank() else self.more(x)


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def problem(more: bool = False, odd: int | None = None) -> tuple[Net, Batch, Batch, list[Tensor]]:
    """A network, training and held-out rows, and the rows of each step's batch."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS + 16, 5), torch.randint(3, (ROWS + 16,))
    order = torch.cat([torch.randperm(ROWS) for _ in range(BATCH * STEPS // ROWS)]).split(BATCH)
    return Net(more, odd), (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]), list(order)


def untold(batch: Batch) -> Tensor:
    raise UnknownRows("nobody tells them")


def train(
    parts: int = 1,
    rank: int = 0,
    recorded: bool = True,
    more: bool = False,
    odd: int | None = None,
    saved: bool = False,
    unknown: Collection[tuple[int, int]] = (),
    accumulate: int = 1,
    **options: Any,
) -> tuple[list[Tensor], InfluenceReport | None]:
    """Trains on the ``rank``-th of ``parts`` of every batch; returns the weights and the report.

    ``saved``: the state is asked for after every step, as checkpoints do. ``unknown``: (step, part) whose rows nobody
    tells. ``accumulate``: the parts come one after the other, in one process.
    """
    module, (x, y), held_out, order = problem(more, odd)
    wrapped = DistributedDataParallel(module, find_unused_parameters=more) if parts > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    settings = {"rows": ROWS, "total_steps": STEPS, "refresh_every": 4, "curvature_every": 1, "distributed": parts > 1}
    settings["accumulate"] = accumulate
    queries = {"val": LossQuery(held_out), "own": "self"}
    recorder = Recorder(
        module, optimizer, queries=queries, loss=loss_of, methods=[FINE(closing=False)], **settings | options
    )
    if recorded:
        recorder.start()
    for step, batch in enumerate(order):
        for part in range(accumulate) if parts == 1 else [rank]:
            rows = batch[part :: max(parts, accumulate)]
            recorder.start_batch(untold if (step, part) in unknown else rows, (x[rows], y[rows]))
            loss = loss_of(wrapped, (x[rows], y[rows])) / accumulate
            recorder.see(loss)
            loss.backward()
            recorder.end_batch()
        optimizer.step()
        optimizer.zero_grad()
        if saved:
            with contextlib.suppress(InfluenceError):
                recorder.state_dict()
    recorder.stop()
    return [p.detach().clone() for p in module.parameters()], recorder.report() if recorded else None


def matrix() -> Block:
    return Block("weight", (nn.Parameter(torch.zeros(6)),), (6,))


def joined(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A process's rows in a reservoir, and what all of them together make of v."""
    grad_sample = Vector(torch.randn(ROWS_STORED, 6, generator=torch.Generator().manual_seed(rank)))
    reservoir, own, processes = GradientSample(200), matrix(), Lockstep(torch.device("cpu"), alone=False)
    reservoir.open([(own, grad_sample)], processes)
    reservoir.select(ROWS_STORED, 1.0, 1)
    reservoir.observe(own, grad_sample)
    reservoir.commit()
    v = torch.arange(12.0).reshape(2, 6)
    applied = reservoir.apply({own: v}, {own: (0.3, 0.1)}, processes)[own]
    return reservoir._stored[own].right[:ROWS_STORED], applied, v


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[Any, Any] = {
        "plain": train(2, rank, recorded=False),
        "no reservoir": train(2, rank, reservoir=0),
        "default": train(2, rank),
        "unknown": train(2, rank, unknown=UNKNOWN, reservoir=0, discount=False),
        "growing": train(2, rank, reservoir=0, rows=None),
        "more": train(2, rank, more=True),
        "more, by autograd": train(2, rank, more=True, uncaptured="fallback"),
        "odd, at once": train(2, rank, odd=0),
        "odd, later": train(2, rank, odd=7),
        "odd, plain": train(2, rank, odd=0, recorded=False),
        "joined": joined(rank),
        "more, plain": train(2, rank, more=True, recorded=False),
    }
    for owner, name in PLACES:
        for after in (0,) if name == "verify" else (0, 5):
            with accident(owner, name, after, lambda: rank == 1):
                found[owner.__name__, name, after] = train(2, rank, saved=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together() -> list[dict[Any, Any]]:
    return spawned("processes", process)


@pytest.mark.parametrize("kind", ["no reservoir", "growing"])
def test_scores_are_those_of_one_process_with_the_whole_batches(together: list[dict[Any, Any]], kind: str) -> None:
    """With the discount: directions are made of the curvature that all processes saw."""
    weights, alone = train(reservoir=0)
    (mine, one), (_, other) = (found[kind] for found in together)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, mine, strict=True))
    assert not unequal(one, other)
    for name in ("mu", "se", "null_sd", "mean_loss", "margins"):
        np.testing.assert_allclose(getattr(one.scores, name), getattr(alone.scores, name), rtol=2e-4, atol=1e-4)
    assert (one.observations == alone.observations).all() and one.run.steps == STEPS
    off = train(reservoir=0, discount=False)[1]
    assert off is not None and np.abs(off.scores.mu - alone.scores.mu).max() > 0.1  # so it could have shown


def test_batches_of_unknown_rows_are_left_out_and_no_process_waits(together: list[dict[Any, Any]]) -> None:
    """Where processes exchange something in a batch, all leave theirs out; else the one alone, and the others know."""
    (_, one), (_, other) = (found["unknown"] for found in together)
    parts = UNKNOWN | {(0, 0), (5, 1)}
    alone = train(accumulate=2, unknown=parts, reservoir=0, discount=False)[1]
    assert not unequal(one, other) and alone is not None and one.run.steps == other.run.steps == STEPS - 3
    for name in ("mu", "se", "null_sd", "mean_loss", "margins"):
        np.testing.assert_allclose(getattr(one.scores, name), getattr(alone.scores, name), rtol=2e-4, atol=1e-4)
    assert (one.observations == alone.observations).all() and one.observations.sum() == BATCH * STEPS - 4 * 7
    for report, here, elsewhere in ((one, 2, 3), (other, 3, 2)):
        assert f"{here} batches left out: nobody tells them" in report.run.notes
        assert f"{elsewhere} batches left out: its rows were unknown in another process" in report.run.notes


def test_the_sample_of_all_processes_discounts_like_that_of_one(
    together: list[dict[Any, Any]],
) -> None:
    (_, one), (_, other) = (found["default"] for found in together)
    alone = train()[1]
    assert not unequal(one, other) and alone is not None
    for k in range(2):  # which rows it draws differs
        assert np.corrcoef(one.scores.mu[:, k], alone.scores.mu[:, k])[0, 1] > 0.97
    assert np.abs(one.scores.mu - together[0]["no reservoir"][1].scores.mu).max() > 0.01


def test_the_sample_holds_the_rows_of_all_processes(together: list[dict[Any, Any]]) -> None:
    (one, applied, v), (other, again, _) = (found["joined"] for found in together)
    assert torch.equal(applied, again) and not torch.equal(one, other)
    reservoir, own = GradientSample(200), matrix()
    reservoir.open([(own, Vector(torch.cat([one, other])))], Lockstep(one.device, alone=True))
    reservoir._stored[own].right[: 2 * ROWS_STORED] = torch.cat([one, other])
    reservoir._filled = 2 * ROWS_STORED
    expected = reservoir.apply({own: v}, {own: (0.3, 0.1)}, Lockstep(one.device, alone=True))[own]
    torch.testing.assert_close(applied, expected)
    assert (applied - v).abs().max() > 0.05


def test_training_is_bit_identical_without_the_recorder(together: list[dict[Any, Any]]) -> None:
    for found in together:
        for kind in found.keys() - {"joined"}:
            start = kind.split(",")[0] if isinstance(kind, str) else ""
            plain = found[f"{start}, plain" if start in ("more", "odd") else "plain"][0]
            assert all(torch.equal(a, b) for a, b in zip(found[kind][0], plain, strict=True)), kind


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{owner.__name__}.{name}" for owner, name in PLACES])
def test_an_exception_in_one_process_stops_the_recording_in_all(
    together: list[dict[Any, Any]], owner: type, name: str, after: int
) -> None:
    """Nobody waits for it: the training went on, which the test before shows."""
    key = (owner.__name__, name, after)
    if key not in together[0] or (name == "verify" and after):
        pytest.skip("called once a run")
    first, second = (found[key][1] for found in together)
    assert any("the roof fell in" in note for note in second.run.notes), second.run.notes
    assert any("process 1 of 2 stopped recording" in note for note in first.run.notes), first.run.notes
    assert abs(first.run.steps - second.run.steps) <= 1 < STEPS


def test_a_layer_that_one_process_uses_is_left_out_in_all(together: list[dict[Any, Any]]) -> None:
    for kind in ("more", "more, by autograd"):
        (_, one), (_, other) = (found[kind] for found in together)
        assert not unequal(one, other) and one.run.steps == STEPS, (one.run.notes, other.run.notes)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_layer_that_fails_in_one_process_is_left_out_in_all(together: list[dict[Any, Any]], when: str) -> None:
    (_, one), (_, other) = (found[f"odd, {when}"] for found in together)
    assert not unequal(one, other) and one.run.steps == other.run.steps == STEPS, (one.run.notes, other.run.notes)
    assert all("body.2.factor" in each.run.uncaptured for each in (one, other))
    told = [[*each.run.notes, *map(": ".join, each.run.uncaptured.items())] for each in (one, other)]
    assert any("body.2" in line and "another process" in line for line in told[0]), told[0]
    assert any("body.2" in line and "ZeroDivisionError: mine" in line for line in told[1]), told[1]


def test_a_single_process_exchanges_with_itself() -> None:
    alone = Lockstep(torch.device("cpu"), alone=True)
    assert alone.exchange(2, 3) == [[2, 3]] and alone.common("ab") == {"a", "b"} and alone.gather(1) == [1]
    alone.leave()
    assert alone.exchange() == [[0, 0]] and not alone.dissolved


class Routed(nn.Module):
    """From its third batch on the second process alone uses one more layer, then both do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.calls = nn.Linear(5, 3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x + self.more(x.tanh()) if self.calls > 3 - dist.get_rank() else x


def routed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, (_, (x, y), held_out, order) = Routed(), problem()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, sgd, ROWS, {"val": LossQuery(held_out)}, loss_of, distributed=True, on_error="raise")
    with recorder:
        for step, batch in enumerate(order[:8]):
            rows, model.calls = batch[rank::2], step
            with recorder.batch(rows, (x[rows], y[rows])):
                loss_of(wrapped, (x[rows], y[rows])).backward()
            sgd.step()
            sgd.zero_grad()
        directions = sorted(block.name for block in recorder.signals._directions)
    torch.save((recorder.report(), directions, recorder.coverage.share), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_a_layer_that_joins_in_one_process_first_gets_its_direction_in_all() -> None:
    (one, mine, share), (other, its, _) = spawned("routed", routed)
    assert not unequal(one, other) and one.run.steps == 8
    assert mine == its == ["body.weight", "more.weight"] and share == 1.0
