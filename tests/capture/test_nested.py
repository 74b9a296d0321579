"""Nested tensors in the jagged layout: every row's gradients against a loop over the rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.data.batches import cut
from ine_callback.data.nested import rows_of
from tests.helpers.oracle import Setting, check, run
from tests.helpers.vision import parameter


class Nested(nn.Module):
    """One block of attention over rows of one to five words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.rms = nn.Embedding(3, 4), nn.LayerNorm(4), nn.RMSNorm(4)
        self.inside, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def mixed(self, x: Tensor) -> Tensor:
        parts = (each.contiguous() for each in self.inside(self.norm(x)).chunk(3, -1))
        q, k, v = (each.unflatten(-1, (2, 2)).transpose(1, 2) for each in parts)
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return x + self.out(found)

    def forward(self, ids: Tensor) -> Tensor:
        words = torch.nested.nested_tensor([row[: 1 + int(row[0]) + int(row[1])] for row in ids], layout=torch.jagged)
        x = self.embed(words)
        x = self.rms(self.mixed(x)).to_padded_tensor(0.0)
        return self.head(torch.tanh(x).sum(1))


class Scaled(Nested):
    """A parameter that meets the entries outside of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = parameter(4)

    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x * self.scale)


def test_rows_gradients_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    check(run(Setting("nested", Nested, (5,), words=True)))


def test_a_parameter_that_meets_nested_entries_is_left_out_by_name() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=": scale .*MulBackward0"):
        result = run(Setting("scaled", Scaled, (5,), words=True), uncaptured="warn", speed=lambda m: {m.scale: 0.0})
    assert set(result.recorder.coverage.uncaptured) == {"scale"}
    check(result)


def test_rows_of_a_nested_tensor_are_cut_out_of_a_batch() -> None:
    rows = [torch.arange(n) for n in (2, 1, 3)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    found, labels = cut((x, torch.tensor([7, 8, 9])), torch.tensor([2, 0]), 3)
    assert [row.tolist() for row in found.unbind()] == [[0, 1, 2], [0, 1]] and labels.tolist() == [9, 7]
    assert rows_of(found).tolist() == [0, 0, 0, 1, 1]
