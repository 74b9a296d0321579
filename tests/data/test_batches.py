"""Batches of any structure, seen as rows along the leading dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ine_callback.data.batches import cut, led_by, micro_batches, size_of
from ine_callback.errors import RowsError


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ([torch.zeros(3), torch.zeros(3)], 3),
        ({"text": ["a", "b"], "x": torch.zeros(2)}, 2),
        ((torch.tensor(1.0), torch.zeros(4)), 4),
        ({"a": {"b": (torch.zeros(5, 1),)}}, 5),
    ],
)
def test_size_of(batch: Any, size: int) -> None:
    assert size_of(batch) == size


@pytest.mark.parametrize("batch", [None, 3, object(), {}, torch.tensor(1.0)])
def test_size_of_what_has_no_rows(batch: Any) -> None:
    with pytest.raises(RowsError, match=f"batch of type {type(batch).__name__} cannot be counted"):
        size_of(batch)


def test_cut_and_micro_batches_keep_the_structure() -> None:
    batch = {
        "x": torch.arange(10).view(5, 2),
        "text": list("abcde"),
        "shared": torch.zeros(3),
        "pair": (torch.arange(5), "n"),
    }
    part = cut(batch, torch.tensor([4, 0]), 5)
    assert part["x"].tolist() == [[8, 9], [0, 1]] and part["text"] == ["e", "a"]
    assert part["shared"].shape == (3,) and part["pair"][0].tolist() == [4, 0] and part["pair"][1] == "n"
    pieces = micro_batches(batch, 2)
    assert [size_of(p) for p in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([p["x"] for p in pieces]), batch["x"])
    assert micro_batches(batch, 5)[0] is batch


class Graph:
    """As torch_geometric's: nodes, a label."""

    def __init__(self, nodes: int) -> None:
        self.x = torch.full((nodes, 2), float(nodes))


class Graphs:
    """As its ``Batch``: the graphs' nodes behind one another."""

    def __init__(self, graphs: list[Graph]) -> None:
        self.graphs, self.x, self.num_graphs = graphs, torch.cat([graph.x for graph in graphs]), len(graphs)

    @classmethod
    def from_data_list(cls, graphs: list[Graph]) -> Graphs:
        return cls(graphs)

    def to_data_list(self) -> list[Graph]:
        return self.graphs


class Special(Graphs):
    """It makes a class of its own for each kind of graph, which cannot be called."""

    def __init__(self) -> None:
        super().__init__([Graph(k) for k in (1, 2, 3)])


def test_batches_of_graphs_are_cut_by_graphs() -> None:
    batch = Special()
    assert size_of(batch) == 3 and led_by(batch, 3) and not led_by(batch, 6)
    part = cut(batch, torch.tensor([2, 0]), 3)
    assert type(part) is Graphs and part.x[:, 0].tolist() == [3.0, 3.0, 3.0, 1.0]
    assert [size_of(piece) for piece in micro_batches(batch, 2)] == [2, 1]


def test_batches_that_cannot_be_cut_stay_whole() -> None:
    batch = object()
    assert micro_batches(batch, 2) == [batch]
