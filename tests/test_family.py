"""The family of protocols: its retrainings against torch alone, and its split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.family import measures, truth
from benchmarks.family.networks import build, make_optimizer
from benchmarks.family.protocols import MAX_WORK, Protocol, draw
from benchmarks.family.recorded import Run
from benchmarks.family.tasks import Task, load, row_losses
from benchmarks.family.truth import orders, retrain

SMALL = Protocol("small", "digits", 40, "mlp", 2, 6, True, "gelu", "torch", "sgd", "constant", 3.0, 10, 2, 0.1)


def alone(protocol: Protocol, task: Task, seed: int, order: Sequence[Tensor], muted: int = -1) -> Tensor:
    """Losses after training one network with torch's own loop."""
    model = build(protocol, seed).double()
    x, xq = (v.double() if v.is_floating_point() else v for v in (task.x, task.xq))
    steps = sum(len(rows.split(protocol.batch)) for rows in order)
    optimizer, scheduler = make_optimizer(protocol, model.parameters(), steps)
    for rows in itertools.chain.from_iterable(epoch.split(protocol.batch) for epoch in order):
        optimizer.zero_grad()
        kept = rows[rows != muted]
        (row_losses(model(x[kept]), task.y[kept]).sum() / len(rows)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    single = task.singles
    with torch.no_grad():
        return torch.cat([row_losses(model(xq), task.yq), row_losses(model(x[single]), task.y[single])])


@pytest.mark.parametrize(
    "protocol",
    [
        SMALL,
        replace(SMALL, optimizer="momentum", schedule="warmup", norm=False, activation="relu", init="he"),
        replace(SMALL, optimizer="adamw", schedule="cosine", init="fan_in"),
        replace(SMALL, data="friedman", optimizer="adamw", schedule="warmup", depth=1),
        replace(SMALL, data="images", network="cnn", optimizer="momentum"),
        replace(SMALL, data="motifs", network="transformer", width=8, optimizer="adamw"),
        replace(SMALL, data="characters", network="transformer", width=8, schedule="cosine"),
    ],
    ids=lambda p: f"{p.data}-{p.network}-{p.optimizer}-{p.schedule}",
)
@pytest.mark.parametrize("removal", ["none", "group", "muted"])
def test_runs_trained_together_are_those_trained_alone(protocol: Protocol, removal: str) -> None:
    task = small_task(protocol)
    left_out = torch.tensor([3, 8, 21, 30, 36]) if removal == "group" else None
    muted = 5 if removal == "muted" else None
    found = retrain(protocol, task, 3, 7, left_out, muted, torch.float64)
    every = list(orders(protocol.rows, 3, protocol.epochs, left_out, torch.Generator().manual_seed(7)))
    for k in range(3):
        expected = alone(protocol, task, 7 + k, [order[k] for order in every], -1 if muted is None else muted)
        torch.testing.assert_close(found[k], expected, rtol=1e-6, atol=1e-9)
    if removal != "none":
        assert (found - retrain(protocol, task, 3, 7, dtype=torch.float64)).abs().max() > 1e-6


def small_task(protocol: Protocol) -> Task:
    """The task, with the groups of a larger one: forty rows hold no groups of a hundred."""
    task = load(replace(protocol, rows=300))
    groups = {"single": tuple(torch.arange(8)[:, None])}
    y = task.y.double() if task.y.is_floating_point() else task.y
    yq = task.yq.double() if task.y.is_floating_point() else task.yq
    return Task(task.x[: protocol.rows], y[: protocol.rows], task.xq, yq, task.flipped[: protocol.rows], groups)


def test_orders_leave_out_a_group_and_keep_the_others_places() -> None:
    group = torch.tensor([1, 4, 9])
    with_all = list(orders(12, 5, 3, None, torch.Generator().manual_seed(0)))
    without = list(orders(12, 5, 3, group, torch.Generator().manual_seed(0)))
    rest = sorted(set(range(12)) - set(group.tolist()))
    for a, b in zip(with_all, without, strict=True):
        assert b.sort(1).values.tolist() == [rest] * 5
        stays = ~torch.isin(a[:, :9], group)
        assert (a[:, :9] == b)[stays].all()


def test_halves_are_fixed_and_alike() -> None:
    halves = draw()
    names = {half: {p.name for p in found} for half, found in halves.items()}
    assert len(names["develop"]) == len(names["report"]) == 10 and not names["develop"] & names["report"]
    assert draw() == halves
    for found in halves.values():
        assert {p.network for p in found} == {"mlp", "cnn", "transformer"}
        assert {p.optimizer for p in found} == {"sgd", "momentum", "adamw"}
        assert sum(p.name.startswith("wide") for p in found) == 1
        assert all(p.rows % p.batch == 0 and (p.work <= MAX_WORK or p.epochs == 2) for p in found)


def test_groups_have_the_sizes_that_they_are_named_for() -> None:
    for protocol in itertools.chain.from_iterable(draw().values()):
        groups = load(protocol).groups
        for size, (low, high) in {"large": (50, 100), "small": (10, 25), "single": (1, 1)}.items():
            assert all(low <= len(group) <= high and len(group.unique()) == len(group) for group in groups[size])


def test_coverage_is_right_for_right_intervals_of_any_number_of_runs() -> None:
    g = np.random.default_rng(0)
    for runs in (2, 5):
        noise = g.standard_normal((runs, 400, 51))
        found = [Run(n, np.ones_like(n), n, n[:, 0], n[0], n[0], 0.0) for n in noise]
        assert measures.coverage(found) == pytest.approx(0.95, abs=0.01)


def test_equal_training_takes_away_what_is_proportional_to_the_size() -> None:
    groups = [np.arange(n) for n in (50, 70, 100)]
    size = np.array([[50.0], [70.0], [100.0]])
    orthogonal = np.array([[7.0], [-5.0], [0.0]])
    found = measures.equal_training(orthogonal + size * [[0.1, -2.0]], groups)
    np.testing.assert_allclose(found, np.hstack([orthogonal, orthogonal]), atol=1e-12)


def test_unit_turns_the_raw_shift_into_mu() -> None:
    g = np.random.default_rng(0)
    raw, unit = g.standard_normal((30, 51)), g.uniform(0.1, 2, 51)
    run = Run(raw / unit, raw, raw, raw[:, 0], raw[0], raw[0], 0.0)
    np.testing.assert_allclose(run.unit, unit)


def test_truth_is_kept_and_another_protocols_is_refused(tmp_path: Path) -> None:
    protocol = replace(SMALL, epochs=1)
    task = small_task(protocol)
    task = replace(task, x=task.x.float(), groups={"small": task.groups["single"][:3], "single": task.groups["single"]})
    found, kept = (truth.load(protocol, task, 2, tmp_path) for _ in range(2))
    assert torch.equal(found.base, kept.base) and torch.equal(found.losses["small"], kept.losses["small"])
    assert kept.mu("small").shape == (3, 58)
    with pytest.raises(SystemExit, match="another truth"):
        truth.load(replace(protocol, epochs=2), task, 2, tmp_path)
    with pytest.raises(SystemExit, match="another truth"):
        truth.load(protocol, replace(task, groups=task.groups | {"small": task.groups["single"][1:4]}), 2, tmp_path)
    with pytest.raises(SystemExit, match="another truth"):
        truth.load(protocol, replace(task, groups=task.groups | {"small": task.groups["single"][:2]}), 2, tmp_path)


def test_worst_protocol_is_the_one_farthest_from_perfect() -> None:
    rows = [{"default": {"unit": u, "coverage": c}} for u, c in ((0.5, 0.99), (3.0, 0.7), (1.2, 0.94))]
    found = measures.summary(rows)
    assert (found["median"]["unit"], found["worst"]["unit"]) == (1.2, 3.0)
    assert (found["median"]["cover"], found["worst"]["cover"]) == (0.94, 0.7)
    negative = measures.summary([*rows, {"default": {"unit": -0.1}}])
    assert negative["worst"]["unit"] == -0.1  # of the wrong sign: worse than any size
