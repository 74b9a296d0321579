"""What benchmarks on G1's network share: the network, its loss, one query for each held-out row, the machine's name."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import g1
from ine_callback.queries import BoundQuery, Query, QuerySource
from ine_callback.scores import QueryInfo

Value = Callable[[nn.Module, Any], Tensor]


class RowLosses(Query):
    """One query for each row of a batch: its own loss, by default the cross entropy."""

    def __init__(self, x: Tensor, y: Tensor, loss: Value | None = None) -> None:
        self.x, self.y = x, y
        self.value: Value = loss or cross_entropy

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        return [
            BoundQuery(
                QueryInfo(f"{name}/{k}", "loss", f"Does training on this row lower the loss of query row {k}?"),
                self.value,
                ((1.0, (self.x[k : k + 1], self.y[k : k + 1])),),
            )
            for k in range(len(self.y))
        ]


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y)


def network(g: torch.Generator) -> nn.Sequential:
    """The protocol's network as torch modules."""
    model = nn.Sequential(nn.Linear(g1.INPUTS, g1.HIDDEN), nn.ReLU(), nn.Linear(g1.HIDDEN, g1.CLASSES))
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), g1.initial(1, g), strict=True):
            parameter.copy_(start[0])
    return model


def machine() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
