"""Regimes of the loss: penalties on weights, gradients inside of the loss, weights used beside their layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.oracle import TELLS

from .models import WORDS, LanguageModel, next_words
from .regime import CLASSES, FEATURES, Classifier, Regime, adam, mlp


class Penalised(Classifier):
    """Cross entropy and a penalty on weights."""

    kind = "L2"

    def of_no_row(self) -> Tensor:
        weights = list(self.net.parameters())
        if self.kind == "L2":
            return 0.02 * torch.stack([p.square().sum() for p in weights]).sum()
        if self.kind == "L1":
            return 0.02 * torch.stack([p.abs().sum() for p in weights]).sum()
        matrices = [p for p in weights if p.dim() == 2]
        return 0.02 * torch.stack([(p @ p.T - torch.eye(len(p)).to(p)).square().sum() for p in matrices]).sum()


def penalised(kind: str, **options: Any) -> Penalised:
    module = Penalised(**options)
    module.kind = kind
    return module


class Smooth(Classifier):
    """Cross entropy and the squared gradient by the input of each row (R1), where gradients are had at all."""

    def loss(self, batch: Any) -> Tensor:
        value = super().loss(batch)
        if not torch.is_grad_enabled():
            return value
        leaf = batch[0].detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(self.net(leaf).sum(), leaf, create_graph=True)
        return value + 0.1 * g.flatten(1).square().sum(1).mean()


class Both(Smooth, Penalised):
    """With a penalty on weights, too."""


class Consistent(Classifier):
    """Cross entropy and how far the answer moves with the input."""

    def loss(self, batch: Any) -> Tensor:
        moved = F.mse_loss(self.net(batch[0] + 0.1), self.net(batch[0]).detach())
        return super().loss(batch) + moved


def normed() -> nn.Module:
    layers = nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.RMSNorm(8), nn.SiLU()
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


class FunctionalHead(nn.Module):
    """A language model whose head is its embedding, without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(WORDS, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.embed(ids).cumsum(1))), self.embed.weight)


GROUP = "losses"
PENALTIES = [
    Regime("L2 penalty in the loss", GROUP, lambda: penalised("L2"), note="belong to no row"),
    Regime("L1 penalty in the loss, AdamW", GROUP, lambda: penalised("L1", optimizer=adam), note="belong to no row"),
    Regime("orthogonality penalty, LayerNorm", GROUP, lambda: penalised("orthogonality", net=normed())),
    Regime(
        "L2 penalty in the loss, accumulated and clipped",
        GROUP,
        lambda: penalised("L2"),
        trainer=lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    ),
    Regime("consistency with a moved input", GROUP, Consistent),
    *(
        [
            Regime("gradient penalty (R1)", GROUP, lambda: Smooth(mlp())),
            Regime("gradient penalty, norms, AdamW", GROUP, lambda: Smooth(normed(), adam)),
            Regime("gradient penalty and L2 penalty", GROUP, lambda: Both(normed())),
            Regime("embedding as head, by F.linear", GROUP, lambda: LanguageModel(FunctionalHead()), next_words),
        ]
        if TELLS
        else []
    ),
]
