"""Regimes whose losses compare rows, or whose layers get some of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .regime import CLASSES, FEATURES, Classifier, Data, Regime, mlp, vectors


class TwoCalls(Classifier):
    """Two views of each row, each in a call of its own."""

    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        views = batch[0] + 0.1, batch[0] * 0.9
        return self.compare(*(F.normalize(self.net(x), dim=1) for x in views))


class NTXent(TwoCalls):
    """SimCLR's loss, of both views joined behind the network."""

    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        z = torch.cat([one, other])
        itself = torch.eye(len(z), dtype=torch.bool)
        return F.cross_entropy((z @ z.T / 0.5).masked_fill(itself, -1e9), torch.arange(len(z)).roll(len(one)))


class VICReg(TwoCalls):
    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        spread = [F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (one, other)]
        return F.mse_loss(one, other) + spread[0] + spread[1]


class Triplet(TwoCalls):
    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        return F.triplet_margin_loss(one, other, other.roll(1, 0))


class SupCon(Classifier):
    """Rows of the same class attract each other."""

    def loss(self, batch: Any) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        itself = torch.eye(len(z), dtype=torch.bool)
        near = z @ z.T / 0.5
        log_p = near - near.masked_fill(itself, -1e9).logsumexp(1, keepdim=True)
        alike = (batch[1][:, None] == batch[1]) & ~itself
        return -((log_p * alike).sum(1) / alike.sum(1).clamp_min(1)).mean()


class HeadsByLabel(Classifier):
    """Several tasks: the label says which head a row goes to, beside a trunk for all in the same list."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)]))

    def loss(self, batch: Any) -> Tensor:
        assert isinstance(self.net, nn.ModuleList)
        z, first = self.net[0](batch[0]).tanh(), batch[1] == 0
        out = z.new_zeros(len(z), CLASSES)
        for head, mine in ((self.net[1], first), (self.net[2], ~first)):
            if mine.any():
                out[mine] = head(z[mine])
        return F.cross_entropy(out, batch[1])


def without_running_statistics() -> Classifier:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return Classifier(nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.ReLU(), nn.Linear(8, CLASSES)))


def fives() -> Data:
    """Batches of one size: a contrastive loss of two rows has hardly a gradient."""
    return vectors(lambda items: DataLoader(items, 5, shuffle=True))


GROUP = "rows that are compared"
COMPARED = [
    *(
        Regime(name, GROUP, lambda kind=kind: kind(mlp()), fives, shares="among")
        for name, kind in {
            "SimCLR, two calls, NT-Xent": NTXent,
            "VICReg, two calls": VICReg,
            "triplets in the batch": Triplet,
            "supervised contrastive": SupCon,
        }.items()
    ),
    Regime("heads chosen by the label", GROUP, HeadsByLabel),
    Regime(
        "BatchNorm without running statistics",
        GROUP,
        without_running_statistics,
        fives,
        shares="among",
        approximate=("net.1",),
    ),
]
