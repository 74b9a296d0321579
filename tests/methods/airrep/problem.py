"""A problem that takes no training: the loss of a dev row falls with the rows' mean product with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from ine_callback.methods.airrep.airrep import AirRep
from ine_callback.methods.airrep.encoder import FeatureEncoder

ROWS, DEV, WIDTH, SIZE = 120, 48, 4, 12


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, WIDTH, generator=g), torch.randn(DEV, WIDTH, generator=g)


class Products:
    """A train function that counts its calls, and may be interrupted."""

    def __init__(self, dies_at: int | None = None, noise: float = 0.0) -> None:
        (self.x, self.dev), self.calls, self.dies_at, self.noise = data(), [], dies_at, noise

    def __call__(self, rows: NDArray[np.int64], seed: int) -> Tensor:
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append((rows, seed))
        g = torch.Generator().manual_seed(seed * 1000 + int(rows.sum()))
        clean = -(self.x[rows].mean(-2) @ self.dev.T)
        return clean + self.noise * torch.randn(clean.shape, generator=g)


def first(batch: Any) -> Tensor:
    found: Tensor = batch[0]
    return found


def airrep(**settings: Any) -> AirRep:
    x, dev = data()
    given = {"subsets": 60, "size": SIZE, "dev": TensorDataset(dev), "pooling": "mean", "steps": 150} | settings
    return AirRep(FeatureEncoder(first, [x], width=16, hidden=32), **given)


def rows() -> TensorDataset:
    return TensorDataset(data()[0])
