"""Contexts of small problems, and each row's gradient by a pass of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback.methods import FitContext
from ine_callback.methods.context import TOGETHER
from ine_callback.queries import CallableQuery
from ine_callback.queries.sources import DataSource

ROWS, WIDTH, CLASSES = TOGETHER + 5, 4, 3
EXACT = {"rtol": 1e-10, "atol": 1e-13}
Loss = Callable[[nn.Module, Any], Tensor]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def choices(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


VECTORS, LABELS = numbers(ROWS, WIDTH), choices(CLASSES, ROWS)


class Tied(nn.Module):
    """Embedding and output share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(self.embed(x)))
        return out


class Twice(nn.Module):
    """One layer that a pass uses twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(self.inner(x).tanh()).tanh())
        return out


def bound(module: nn.Module, loss: Loss, data: tuple[Tensor, ...], **options: Any) -> FitContext:
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    source = DataSource("Test", loss, loader, [loader], 10**6)
    queries = {
        "some": CallableQuery(loss, tuple(part[:9] for part in data)),
        "own": CallableQuery(lambda module, batch: loss(module, batch) * 2, tuple(part[9:20] for part in data)),
    }
    found = [query for name, each in queries.items() for query in each.bind(name, source)]
    return FitContext(module, found, source, loss, owner="Test", **options)


def explicit(module: nn.Module, loss: Loss, data: tuple[Tensor, ...], names: list[str]) -> dict[str, Tensor]:
    """Each row's gradient [N, *shape] of its loss alone, in evaluation mode; 0 where it has none."""
    parameters, rows = dict(module.named_parameters()), []
    training = module.training
    module.eval()
    for row in range(len(data[0])):
        value = loss(module, tuple(part[row : row + 1] for part in data))
        gradients = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
        rows.append(
            [torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, gradients, strict=True)]
        )
    module.train(training)
    return {n: torch.stack([row[k] for row in rows]).nan_to_num() for k, n in enumerate(names)}


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}
