"""Batches of any structure, seen as rows along the leading dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ine_callback.data.batches import cut, micro_batches, size_of
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
    with pytest.raises(RowsError, match=f"batch of type {type(batch).__name__} .*row_fn"):
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
