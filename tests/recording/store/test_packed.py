"""Documents packed into sequences are rows of the store: each has a vector of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ine_callback import GradientStore, RowEntries
from tests.helpers.entries import LENGTH, PACKED, Module, PackedModel, PackedTexts, fit, next_token
from tests.helpers.stored import Functional, Raw


class Untied(PackedModel):
    """With a head of its own: a tied weight's discount is that of single entries, which the store has in part."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 7, bias=False)


WHOLE = GradientStore(bytes_per_row=4 + 4 * 512, dtype="float32")  # more numbers than there are parameters


def tokens(batch: Any) -> RowEntries:
    """Each token as a row of its own."""
    ids = batch[1] * LENGTH + torch.arange(LENGTH)
    return RowEntries.of_tokens(torch.where(batch[1] < 0, -1, ids))


def directions(count: int) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    shapes = [p.shape for p in Untied().parameters()]
    return [[torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes] for _ in range(count)]


def recorded(rows: int, row_fn: Any) -> tuple[Any, Raw]:
    """A recorded run with queries whose gradients are the same at all weights."""
    data, method = PackedTexts(), Raw(closing=False)
    loaders = DataLoader(data, PACKED), DataLoader(data, PACKED)
    options = {"queries": {"w": Functional(directions(3))}, "methods": [method], "discount": True, "refresh_every": 100}
    _, callback, _ = fit(
        lambda: Module(Untied(), next_token), loaders, **options, row_fn=row_fn, num_rows=rows, store=WHOLE
    )
    return callback, method


@pytest.mark.parametrize(
    ("rows", "row_fn"),
    [(PackedTexts().texts, lambda batch: RowEntries.of_tokens(batch[1])), (PackedTexts().texts * LENGTH, tokens)],
)
def test_packed_documents_and_tokens_have_the_vectors_that_their_signals_have(rows: int, row_fn: Any) -> None:
    callback, method = recorded(rows, row_fn)
    store, asked = callback._recorder.store, directions(3)
    named = dict(zip(callback._recorder.training.module.parameters(), range(len(asked[0])), strict=True))
    which, vectors = store.vectors.own(rows), store.vectors.vectors(rows)
    entries = torch.zeros(3, store.compression.size)
    for block in callback._recorder.signals.table:
        v = block.to_layout([torch.stack([w[named[p]] for w in asked]) for p in block.parameters])
        place = store.compression.places[block.key]
        entries[:, place] = store.compression.bases[block.key].of_vectors(v).float()
    named_rows = (callback.report.observations > 0).sum()
    assert which.tolist() == list(range(rows)) and (method.raw.abs().sum(1) > 0).sum() > named_rows / 2
    torch.testing.assert_close(vectors @ entries.T, method.raw, rtol=1e-4, atol=1e-4 * float(method.raw.abs().max()))
    report = callback.report
    assert report.store.rows.shape[0] == rows
    np.testing.assert_array_equal(report.store.seen, report.observations > 0)
