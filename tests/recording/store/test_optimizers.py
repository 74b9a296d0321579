"""The store of a training with several optimizers: each block's contributions at its own optimizer's rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from ine_callback import Recorder
from ine_callback.report.stored_vectors import StoredVectors
from tests.helpers.stored import ALL, ROWS, Functional, Raw, batches, data, loss_of, network

Make = Callable[[nn.Sequential], list[SGD]]


def directions() -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [[torch.randn(p.shape, generator=g) for p in network().parameters()] for _ in range(3)]


def recorded(make: Make, turns: bool = False) -> tuple[Recorder, Raw]:
    """A recorded loop; by turns only one of the optimizers steps."""
    model, (x, y) = network(), data()
    optimizers, method = make(model), Raw(closing=False)
    options: dict[str, Any] = {"total_steps": len(batches()), "refresh_every": 12, "store": ALL, "on_error": "raise"}
    queries = {"w": Functional(directions())}
    recorder = Recorder(model, optimizers, ROWS, queries, loss_of, [method], **options | {"on_error": "warn"})
    with recorder:
        for step, rows in enumerate(batches()):
            with recorder.batch(rows, (x[rows], y[rows])):
                loss = loss_of(model, (x[rows], y[rows]))
                recorder.see(loss)
                loss.backward()
            for k, optimizer in enumerate(optimizers):
                if not turns or step % len(optimizers) == k:
                    optimizer.step()
            model.zero_grad()
    return recorder, method


def halves(*rates: float) -> Make:
    return lambda model: [
        SGD([*model[0].parameters(), *model[2].parameters()], lr=rates[0]),
        SGD(model[3].parameters(), lr=rates[1], momentum=0.5),
    ]


def test_two_optimizers_give_the_vectors_that_their_signals_have() -> None:
    recorder, method = recorded(halves(0.1, 0.03))
    store, asked = recorder.store, directions()
    assert store is not None
    vectors = store.vectors.vectors(ROWS)
    named = {p: k for k, p in enumerate(recorder.training.module.parameters())}
    entries = torch.zeros(3, store.compression.size)
    for block in recorder.signals.table:
        v = block.to_layout([torch.stack([w[named[p]] for w in asked]) for p in block.parameters])
        entries[:, store.compression.places[block.key]] = store.compression.bases[block.key].of_vectors(v)
    torch.testing.assert_close(vectors @ entries.T, method.raw, rtol=2e-3, atol=2e-3 * float(method.raw.abs().max()))


def test_two_optimizers_of_one_kind_have_one_s_store() -> None:
    def both(model: nn.Sequential) -> list[SGD]:
        return [SGD(part.parameters(), lr=0.1) for part in (model[:3], model[3:])]

    found: list[StoredVectors] = []
    for make in (both, lambda model: [SGD(model.parameters(), lr=0.1)]):
        store = recorded(make)[0].report().store
        assert store is not None
        found.append(store)
    grams = [(store.rows * store.scale[:, None]) @ (store.rows * store.scale[:, None]).T for store in found]
    np.testing.assert_allclose(grams[0], grams[1], atol=1e-4 * np.abs(grams[1]).max())


def test_optimizers_that_take_turns_have_none() -> None:
    with pytest.warns(UserWarning, match="no gradient store, though one was asked for: .*take turns"):
        report = recorded(halves(0.1, 0.1), turns=True)[0].report()
    assert report.store is None and np.isfinite(report.scores.mu).any()
