"""``uncaptured="fallback"`` where rows do not lead: exact if a batch can be cut into single rows, else words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.entries import (
    EXACT,
    GRAPHS,
    PACKED,
    TEXTS,
    TOGETHER,
    Batch,
    GraphNet,
    Module,
    PackedModel,
    PackedTexts,
    fit,
    graphs,
    next_token,
    rows_of_graphs,
)
from tests.helpers.oracle import opaque


class OpaqueGraphs(GraphNet):
    """The bias comes by an operation that nobody reads."""

    def forward(self, batch: Batch) -> Tensor:
        kept = self.bias
        try:
            del self._parameters["bias"]
            self.bias = opaque(kept)
            return super().forward(batch)
        finally:
            del self.bias
            self.register_parameter("bias", kept)


class OpaqueTexts(PackedModel):
    def forward(self, ids: Tensor, texts: Tensor) -> Tensor:
        return super().forward(ids, texts) + 0.1 * opaque(self.scale).sum()


def graph_loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch), batch.y)


def test_graphs_are_taken_one_by_one() -> None:
    loaders = (DataLoader(graphs(), size, collate_fn=Batch) for size in (TOGETHER, GRAPHS))
    options: dict[str, Any] = {"row_fn": rows_of_graphs, "num_rows": GRAPHS, "uncaptured": "fallback"}
    module, callback, keep = fit(lambda: Module(OpaqueGraphs(), graph_loss), tuple(loaders), **options)
    coverage = callback._recorder.coverage
    assert coverage.share == 1.0 and any("per-row autograd" in note and "bias" in note for note in coverage.notes)
    seen = [one for one in module.seen if one[0].num_graphs == TOGETHER][-len(keep.steps) :]
    for (batch, weights), (_, signals, _) in zip(seen, keep.steps, strict=True):
        net = GraphNet().double()
        net.load_state_dict(weights)
        v = torch.autograd.grad(graph_loss(net, Batch(graphs())), list(net.parameters()))
        for (of_query, _), item in zip(signals, batch.items, strict=True):
            g = torch.autograd.grad(graph_loss(net, Batch([item])) / TOGETHER, list(net.parameters()))
            torch.testing.assert_close(of_query, sum((a * b).sum() for a, b in zip(v, g, strict=True)), **EXACT)


def test_texts_that_cannot_be_cut_out_of_their_sequences_are_left_out_with_words() -> None:
    data = PackedTexts()
    loaders = DataLoader(data, PACKED), DataLoader(data, TEXTS)
    options: dict[str, Any] = {"row_fn": lambda batch: batch[1], "num_rows": data.texts, "uncaptured": "fallback"}
    with pytest.warns(UserWarning, match=r"scale .*uncaptured='fallback' needs batches that can be cut into rows"):
        _, callback, _ = fit(lambda: Module(OpaqueTexts(), next_token), loaders, **options)
    assert set(callback._recorder.coverage.uncaptured) == {"net.scale"}
