"""Regimes of torch.compile: whole networks, parts of them, methods; with what else trains with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .models import Checkpointed, LanguageModel, Tied, next_words, pictures
from .regime import CLASSES, FEATURES, Classifier, Regime


def compiled(module: Classifier, first: int | None = None, **options: Any) -> Classifier:
    """The module with its network, or the first layers of that, run by torch.compile."""
    if first is None:
        module.net = torch.compile(module.net, **options)
    else:
        module.net = nn.Sequential(torch.compile(module.net[:first], **options), *module.net[first:])
    return module


def uncompiled(module: Classifier) -> None:
    module.net = getattr(module.net, "_orig_mod", module.net)
    if isinstance(module.net, nn.Sequential) and hasattr(module.net[0], "_orig_mod"):
        module.net[0] = module.net[0]._orig_mod


class Branches(nn.Module):
    """A convolution and a norm, one layer used twice, dropout, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(1, 4, 3), nn.LayerNorm(64), nn.Linear(64, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(nn.functional.relu(self.conv(x), inplace=True).flatten(1))
        return self.head(self.twice(torch.tanh_(self.twice(x))))


class InPlace(Classifier):
    """Compiled by ``Module.compile``."""

    def __init__(self, net: Callable[[], nn.Module], **options: Any) -> None:
        super().__init__(net())
        self.net.compile(**options)


class OfMethod(Classifier):
    """No module is compiled, but a method that calls some."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.scores = torch.compile(self._scores, **options)

    def _scores(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.net(x)))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.scores(batch[0]), batch[1])


def method_as_written(module: OfMethod) -> None:
    module.scores = module._scores


class WithToken(nn.Module):
    """Adds a parameter of its own to what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer, self.head = nn.Parameter(torch.ones(6)), nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x) + self.shift))


class OwnLoss(nn.Module):
    """Computes its loss itself, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class LossInside(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0], labels=batch[1])["loss"]


COMPILED: list[Regime] = [
    Regime("torch.compile", "compiled", lambda: compiled(Classifier(), backend="eager"), plain_form=uncompiled),
    Regime(
        "torch.compile, fullgraph, convolution, a layer twice",
        "compiled",
        lambda: compiled(Classifier(Branches()), backend="aot_eager", fullgraph=True),
        pictures,
        plain_form=uncompiled,
    ),
    Regime(
        "Module.compile",
        "compiled",
        lambda: InPlace(Branches, backend="eager"),
        pictures,
        trainer=lambda: {"accumulate_grad_batches": 2},
    ),
    Regime(
        "torch.compile, in part",
        "compiled",
        lambda: compiled(Classifier(), first=2, backend="eager"),
        plain_form=uncompiled,
        slow=True,
    ),
    Regime(
        "torch.compile of a method",
        "compiled",
        lambda: OfMethod(backend="eager"),
        plain_form=method_as_written,
        slow=True,
    ),
    Regime(
        "torch.compile, checkpoints",
        "compiled",
        lambda: compiled(Classifier(Checkpointed(reentrant=False)), backend="eager"),
        plain_form=uncompiled,
        slow=True,
    ),
    Regime(
        "torch.compile, tied embedding, tokens",
        "compiled",
        lambda: compiled(LanguageModel(Tied()), backend="eager"),
        next_words,
        plain_form=uncompiled,
        slow=True,
    ),
    Regime(
        "torch.compile, a parameter outside of layers",
        "compiled",
        lambda: compiled(Classifier(WithToken()), backend="eager"),
        plain_form=uncompiled,
        left_out=("net.shift",),
        slow=True,
    ),
    Regime(
        "torch.compile, a parameter outside of layers, fallback",
        "compiled",
        lambda: compiled(Classifier(WithToken()), backend="eager"),
        influence={"uncaptured": "fallback"},
        plain_form=uncompiled,
        slow=True,
    ),
    Regime(
        "torch.compile, loss inside",
        "compiled",
        lambda: compiled(LossInside(OwnLoss()), backend="eager", fullgraph=True),
        plain_form=uncompiled,
    ),
    Regime(
        "torch.compile, bf16",
        "compiled",
        lambda: compiled(Classifier(), backend="eager"),
        trainer=lambda: {"precision": "bf16-mixed"},
        plain_form=uncompiled,
        tolerance=3e-2,
        slow=True,
    ),
    Regime(
        "torch.compile (inductor)",
        "compiled",
        lambda: compiled(Classifier(Branches()), fullgraph=True),
        pictures,
        plain_form=uncompiled,
        slow=True,
    ),
]
