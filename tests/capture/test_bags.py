"""``nn.EmbeddingBag``: every row's gradients against a loop over the rows, however many entries a bag has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.oracle import Setting, check, run

WORDS = 3  # of the oracle's batches


class Bags(nn.Module):
    """Ragged bags: of each row's five words those that are not 2 are in its bag, which may be empty."""

    def __init__(self, bags: int = 1, weighted: bool = False, matrix: bool = False, **options: Any) -> None:
        super().__init__()
        self.bags, self.weighted, self.matrix = bags, weighted, matrix
        self.bag, self.head = nn.EmbeddingBag(WORDS, 4, **options), nn.Linear(4 * bags, 3)

    def forward(self, ids: Tensor) -> Tensor:
        weights = (1 + ids.double()).sin() if self.weighted else None
        if self.matrix:
            return self.head(torch.tanh(self.bag(ids, per_sample_weights=weights)))
        chosen = (ids != 2).unflatten(1, (self.bags, -1))
        ends = chosen.sum(2).flatten().cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends if self.bag.include_last_offset else ends[:-1]])
        flat, kept = ids[ids != 2], None if weights is None else weights[ids != 2]
        found = self.bag(flat, offsets, kept).unflatten(0, (-1, self.bags)).flatten(1)
        return self.head(torch.tanh(found))


SETTINGS: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: Bags(mode="sum"),
    "mean": lambda: Bags(mode="mean"),
    "weighted": lambda: Bags(mode="sum", weighted=True),
    "padding": lambda: Bags(mode="mean", padding_idx=1),
    "last offset": lambda: Bags(mode="mean", include_last_offset=True),
    "two bags a row": lambda: Bags(bags=2, mode="mean"),
    "matrix": lambda: Bags(matrix=True, mode="mean", padding_idx=0),
    "matrix, weighted": lambda: Bags(matrix=True, mode="sum", weighted=True),
    "sparse": lambda: Bags(mode="sum", sparse=True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_gradients_are_those_of_a_loop(name: str) -> None:
    torch.manual_seed(0)
    check(run(Setting(name, SETTINGS[name], (6,), words=True), steps=3))


LEFT_OUT = {"largest": {"mode": "max"}, "frequency": {"scale_grad_by_freq": True}}


@pytest.mark.parametrize("words", LEFT_OUT)
def test_what_the_kernel_keeps_to_itself_is_left_out_by_name(words: str) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=rf"bag\.weight .*{words}"):
        result = run(
            Setting(words, lambda: Bags(matrix=True, **LEFT_OUT[words]), (6,), words=True),
            uncaptured="warn",
            speed=lambda m: {m.bag.weight: 0.0},
        )
    check(result)


def test_bags_in_another_order_than_the_rows_are_found_out() -> None:
    class Turned(Bags):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.bag(ids.flip(0)).flip(0)))

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"bag\.weight .*not led by the batch's 4 rows"):
        result = run(
            Setting("turned", lambda: Turned(mode="sum"), (6,), words=True),
            uncaptured="warn",
            speed=lambda m: {m.bag.weight: 0.0},
        )
    check(result)
