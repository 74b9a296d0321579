"""Rows that do not lead: each entry is contracted by itself and added up by row, as in a pass for each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ine_callback import IF, RowEntries
from ine_callback.capture.entries import EntryIndex
from ine_callback.data.row_entries import row_entries
from ine_callback.errors import RowsError, UnknownRows
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
from tests.helpers.vision import needs_saved


def graph_loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch), batch.y)


def of_graphs(**options: Any) -> Any:
    loaders = (DataLoader(graphs(), size, collate_fn=Batch) for size in (TOGETHER, GRAPHS))
    options = {"row_fn": rows_of_graphs, "num_rows": GRAPHS, **options}
    return fit(lambda: Module(GraphNet(), graph_loss), tuple(loaders), **options)


def of_texts(**options: Any) -> Any:
    data = PackedTexts()
    loaders = DataLoader(data, PACKED), DataLoader(data, TEXTS)
    options = {"row_fn": lambda batch: batch[1], "num_rows": data.texts, **options}
    return fit(lambda: Module(PackedModel(), next_token), loaders, **options)


def check(net: nn.Module, v: list[Tensor], signals: Tensor, losses: list[Tensor]) -> None:
    """Signals of the query and of self-influence against the gradients of the rows' parts of the loss."""
    for (of_query, of_self), loss in zip(signals, losses, strict=True):
        g = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        torch.testing.assert_close(of_query, sum((a * b).sum() for a, b in zip(v, g, strict=True)), **EXACT)
        torch.testing.assert_close(of_self, len(losses) * sum(b.square().sum() for b in g), **EXACT)


@needs_saved
def test_nodes_edges_and_graphs() -> None:
    module, callback, keep = of_graphs()
    coverage = callback._recorder.coverage
    assert coverage.share == 1.0 and not coverage.notes and len(keep.steps) == GRAPHS // TOGETHER
    seen = [one for one in module.seen if one[0].num_graphs == TOGETHER][-len(keep.steps) :]
    for (batch, weights), (rows, signals, _) in zip(seen, keep.steps, strict=True):
        net = GraphNet().double()
        net.load_state_dict(weights)
        assert rows.tolist() == batch.row.tolist()
        v = torch.autograd.grad(graph_loss(net, Batch(graphs())), list(net.parameters()))
        check(net, v, signals, [graph_loss(net, Batch([item])) / TOGETHER for item in batch.items])


def test_texts_packed_into_sequences() -> None:
    module, callback, keep = of_texts()
    coverage, data = callback._recorder.coverage, PackedTexts()
    assert not coverage.notes and len(keep.steps) == TEXTS // PACKED
    assert set(coverage.uncaptured) <= {"net.scale"}  # where torch does not tell what checkpoints saved
    everything = next(iter(DataLoader(data, TEXTS)))
    for (batch, weights), (rows, signals, _) in zip(module.seen[-len(keep.steps) :], keep.steps, strict=True):
        net = PackedModel().double()
        net.load_state_dict(weights)
        net.scale.requires_grad_(not coverage.uncaptured)
        parameters = [p for p in net.parameters() if p.requires_grad]
        assert rows.tolist() == [text for text in batch[1].unique().tolist() if text >= 0]
        v = torch.autograd.grad(next_token(net, everything), parameters)
        terms = next_token(net, batch, reduction="sum") / next_token(net, batch)
        losses = [next_token(net, batch, only=int(row), reduction="sum") / terms.detach() for row in rows]
        for (of_query, of_self), loss in zip(signals, losses, strict=True):
            g = torch.autograd.grad(loss, parameters)
            torch.testing.assert_close(of_query, sum((a * b).sum() for a, b in zip(v, g, strict=True)), **EXACT)
            torch.testing.assert_close(of_self, len(losses) * sum(b.square().sum() for b in g), **EXACT)


def test_losses_of_packed_texts_are_known() -> None:
    _, callback, _ = of_texts()
    found, data = callback._recorder.accumulators._losses.mean(), PackedTexts()
    first = next(iter(DataLoader(data, PACKED)))
    torch.manual_seed(0)
    net = Module(PackedModel(), next_token).net
    for text in [text for text in first[1].unique().tolist() if text >= 0][:3]:
        assert found[text] == pytest.approx(float(next_token(net, first, only=text)), rel=1e-5)


@pytest.mark.parametrize("run", [of_graphs, of_texts])
def test_the_closing_pass_and_the_discount_take_entries(run: Any) -> None:
    _, callback, _ = run(discount=True, rank=4, methods=None)
    assert np.isfinite(callback.report.scores.mu).all()
    assert not any("closing pass" in note for note in callback.report.run.notes)


def test_influence_functions_take_entries() -> None:
    _, callback, _ = of_graphs(methods=[IF(damping=0.1)])
    assert np.isfinite(callback.report.attribution("IF-EKFAC").scores).all()


def test_entries_whose_order_is_another_are_found_before_the_first_step() -> None:
    class Reversed(PackedModel):
        def forward(self, ids: Tensor, texts: Tensor) -> Tensor:
            return super().forward(ids.flip(0), texts.flip(0)).flip(0)

    data = PackedTexts()
    loaders = DataLoader(data, PACKED), DataLoader(data, TEXTS)
    _, callback, keep = fit(
        lambda: Module(Reversed(), next_token), loaders, row_fn=lambda batch: batch[1], num_rows=data.texts
    )
    assert not keep.steps and "where row_fn says so" in " ".join(callback._recorder.capture.dropped.values())


def test_nodes_that_nobody_can_move_are_recorded_with_a_note() -> None:
    """A tuple of tensors: labels can be exchanged, nodes cannot."""

    def collate(items: list[Any]) -> Any:
        batch = Batch(items)
        return batch.x, batch.batch, batch.y, batch.row

    def loss(net: nn.Module, batch: Any) -> Tensor:
        x, of_node, y, _ = batch
        pooled = torch.zeros(len(y), 8).to(x).index_add(0, of_node, torch.tanh(net[0](x)))
        return F.cross_entropy(net[1](pooled), y)

    loaders = tuple(DataLoader(graphs(), size, collate_fn=collate) for size in (TOGETHER, GRAPHS))
    make = lambda: Module(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), loss)  # noqa: E731
    _, callback, keep = fit(make, loaders, row_fn=lambda batch: RowEntries(batch[3], batch[1]), num_rows=GRAPHS)
    coverage = callback._recorder.coverage
    assert coverage.share == 1.0 and len(keep.steps) == GRAPHS // TOGETHER
    assert any("order of entries" in note and "not checked" in note for note in coverage.notes)


def test_ids_by_token_name_texts_in_order_of_their_index() -> None:
    found = row_entries(torch.tensor([[5, 5, 9], [9, -100, -1]]))
    assert found is not None
    assert found.rows.tolist() == [5, 9] and found.of_entries.tolist() == [[0, 0, 1], [1, -1, -1]]
    assert row_entries(torch.tensor([3, 4])) is None and row_entries([3, 4]) is None


def test_a_tensor_is_recognised_by_the_shape_that_it_begins_with() -> None:
    tokens, nodes = torch.tensor([[0, 1, -1], [1, 1, 0]]), torch.tensor([0, 0, 1, 1, 1])
    index = EntryIndex(RowEntries(torch.tensor([7, 8]), [tokens, nodes]), 2, torch.device("cpu"), "me")
    for shape, expected in [((2, 3, 4), [0, 1, 2, 1, 1, 0]), ((6, 4), [0, 1, 2, 1, 1, 0]), ((5, 4), [0, 0, 1, 1, 1])]:
        found = index.find(shape)
        assert found is not None and found[0].tolist() == expected
    assert index.find((4, 3)) is None and index.of((2, 9)) == (None, 1)


def test_equally_many_entries_of_two_kinds_are_refused() -> None:
    entries = RowEntries(torch.tensor([7, 8]), [torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])])
    with pytest.raises(UnknownRows, match=r"2 rows with 3 and 3 entries.*equally many"):
        EntryIndex(entries, 2, torch.device("cpu"), "me")


def test_an_index_must_be_one() -> None:
    with pytest.raises(RowsError, match=r"me: RowEntries\(of_entries=...\) of shape \(2,\) and torch.float32"):
        EntryIndex(RowEntries(torch.tensor([7]), torch.rand(2)), 1, torch.device("cpu"), "me")
