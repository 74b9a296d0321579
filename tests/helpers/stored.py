"""A small training with a gradient store."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import FINE, GradientStore, Query, Recorder
from ine_callback.queries import BoundQuery, QuerySource
from ine_callback.scores import QueryInfo

ROWS, BATCH, EPOCHS = 48, 8, 4
ALL = GradientStore(bytes_per_row=4 + 4 * 512, dtype="float32")  # more numbers than the model has parameters


class Functional(Query):
    """``<w, parameters>``: a query whose gradient is the same at all weights."""

    def __init__(self, directions: list[list[Tensor]]) -> None:
        self.directions = directions

    def bind(self, name: str, source: QuerySource) -> list[BoundQuery]:
        def value(which: int) -> Any:
            pairs = self.directions[which]
            return lambda module, batch: sum((p * w).sum() for p, w in zip(module.parameters(), pairs, strict=True))

        data = ((1.0, (torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))),)
        return [
            BoundQuery(QueryInfo(f"{name}/{k}", "custom", "?"), value(k), data) for k in range(len(self.directions))
        ]


class Raw(FINE):
    """f-INE that also keeps the shifts without their units."""

    def start(self, rows: int, queries: Any, *rest: Any, **more: Any) -> None:
        super().start(rows, queries, *rest, **more)
        self.raw = torch.zeros(rows, len(queries))

    def update(self, rows: Tensor, signals: Tensor, rate: float, *rest: Any) -> None:
        super().update(rows, signals, rate, *rest)
        shifts = signals.float() * rate
        self.raw.index_add_(0, rows, shifts - (shifts.sum(0) - shifts) / (len(rows) - 1))


def network(seed: int = 0) -> nn.Sequential:
    """Linear, ReLU, norm, linear: matrices and vectors."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3))


def data() -> tuple[Tensor, Tensor]:
    """Rows and labels."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=g), torch.randint(3, (ROWS,), generator=g)


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


def batches() -> list[Tensor]:
    """The rows of each step."""
    g = torch.Generator().manual_seed(2)
    return [part for _ in range(EPOCHS) for part in torch.randperm(ROWS, generator=g).split(BATCH)]


class Training:
    """A training that is recorded in a plain loop."""

    def __init__(self, store: GradientStore | None, optimizer: str = "sgd", **options: Any) -> None:
        self.model, (self.x, self.y) = network(), data()
        kinds: dict[str, Any] = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        }
        self.optimizer = kinds[optimizer](self.model.parameters())
        queries = {"val": (self.x[:6] + 0.1, self.y[:6]), "other": (self.x[6:12] - 0.1, self.y[6:12])}
        options = {"queries": queries, "methods": [Raw()], "rows": ROWS, "refresh_every": 5} | options
        self.recorder = Recorder(
            self.model,
            self.optimizer,
            loss=loss_of,
            total_steps=len(batches()),
            store=store,
            on_error="raise",
            **options,
        )

    def steps(self, which: slice = slice(None)) -> None:
        """Some of the steps."""
        for rows in batches()[which]:
            batch = (self.x[rows], self.y[rows])
            with self.recorder.batch(rows, batch):
                loss = loss_of(self.model, batch)
                self.recorder.see(loss)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
