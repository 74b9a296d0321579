"""Regimes of the model: layers that share, repeat, mix, freeze, recompute, or cannot be captured."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.oracle import TELLS
from tests.helpers.vision import LEFT_OUT, Vision

from .regime import CLASSES, FEATURES, Classifier, Data, Regime, classes, mlp, vectors

WORDS, LENGTH = 7, 5


def sentences() -> Data:
    """Rows of word numbers, the class is the row's."""
    return vectors(draw=lambda g, rows: (torch.randint(WORDS, (rows, LENGTH), generator=g), classes(g, rows)))


def series() -> Data:
    return vectors(draw=lambda g, rows: (torch.randn(rows, LENGTH, 4, generator=g), classes(g, rows)))


def pictures() -> Data:
    return vectors(draw=lambda g, rows: (torch.randn(rows, 1, 6, 6, generator=g), classes(g, rows)))


def next_words() -> Data:
    def draw(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(WORDS, (rows, LENGTH + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    return vectors(draw=draw)


class Checkpointed(nn.Module):
    """Its first half is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body, self.head = mlp()[:4], nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, 6), nn.Linear(6, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids).cumsum(1))))


class LanguageModel(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def terms(self, single: Any) -> int:
        return LENGTH


class Reused(nn.Module):
    """One layer twice, once on its own output, and in-place activations between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(FEATURES, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.layer(self.first(x).sigmoid_()), inplace=True)
        return self.head(self.layer(x).tanh_())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn, self.checkpointed = kind(4, 5, batch_first=True, **options), checkpointed
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = checkpoint(self.rnn, x, use_reentrant=False) if self.checkpointed else self.rnn(x)
        return self.head(y[:, -1])


class Packed(nn.Module):
    """Sequences of different lengths, in both directions, read from the last states; time first."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 3, num_layers=2, bidirectional=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (2 * x[:, 0, 0].abs()).long().clamp(max=LENGTH - 1)
        packed = nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), lengths.cpu(), enforce_sorted=False)
        states = self.rnn(packed)[1]
        h = states[0] if isinstance(states, tuple) else states
        return self.head(torch.cat([h[-2], h[-1]], 1))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states = None
        for each in x.unbind(1):
            states = self.cell(each, states)
        return self.head(states[0])


class OwnLSTM(nn.LSTM):
    """Its forward could be anything, so it is not recorded as a layer."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(x, hx)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Residual(nn.Module):
    """A small ResNet with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.inner, self.outer = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head, self.relu = nn.Linear(4, CLASSES), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.outer(self.two(self.relu(self.inner(self.one(x))))) + x)
        return self.head(x.mean((2, 3)))


class Views(nn.Module):
    """Joins two views of each row for its convolutions, and takes their mean."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
        self.body, self.head = nn.Sequential(*layers), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.body(torch.cat([x, x.flip(-1)])).mean((2, 3)))
        return found.unflatten(0, (2, -1)).mean(0)


class OtherRMSNorm(nn.Module):
    """As many libraries write it, with a scale of 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1.0 + self.weight)


class MisnamedRMSNorm(OtherRMSNorm):
    """Is none: verification in the first step must drop it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + self.weight)


def runs_recurrent_bf16() -> bool:
    """Whether torch's fused LSTM, oneDNN's, has a kernel for bfloat16 on this processor; if not it raises."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(4, 5)(torch.zeros(1, 1, 4))
    except RuntimeError:
        return False
    return True


def normed(norm: type[OtherRMSNorm]) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), norm(8), nn.Tanh(), nn.Linear(8, CLASSES))


def frozen() -> nn.Module:
    net = mlp()
    net[2].requires_grad_(False)
    net[0].bias.requires_grad_(False)
    return net


class Thaws(BaseFinetuning):
    """The first layers join in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:3])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.05, initial_denom_lr=1.0)


class Freezes(BaseFinetuning):
    """The first layers are done after the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.freeze(pl_module.net[:3])


VISION = tuple(f"net.{name}" for name in LEFT_OUT)
RNN = tuple(f"net.rnn.{name}_{side}_l{k}" for name in ("weight", "bias") for side in ("ih", "hh") for k in range(2))
ATTENTION = () if TELLS else tuple(f"net.attention.{name}" for name in ("in_proj_weight", "out_proj.weight"))
SLOWLY = {"uncaptured": "fallback"}
MODELS = [
    Regime("activation checkpointing", "models", lambda: Classifier(Checkpointed(reentrant=False))),
    Regime(
        "activation checkpointing, reentrant",
        "models",
        lambda: Classifier(Checkpointed(reentrant=True)),
        plain_form=lambda module: setattr(module.net, "reentrant", False),
    ),
    Regime("tied embedding", "models", lambda: LanguageModel(Tied()), next_words),
    Regime("a layer used twice, in-place activations", "models", lambda: Classifier(Reused())),
    Regime("another library's RMSNorm", "models", lambda: Classifier(normed(OtherRMSNorm))),
    Regime(
        "a layer that is not what its name says",
        "models",
        lambda: Classifier(normed(MisnamedRMSNorm)),
        left_out=() if TELLS else ("net.1.weight",),
    ),
    Regime("frozen parameters", "models", lambda: Classifier(frozen())),
    Regime("parameters that thaw (BaseFinetuning)", "models", trainer=lambda: {"callbacks": [Thaws()]}),
    Regime("parameters that freeze", "models", trainer=lambda: {"callbacks": [Freezes()]}),
    Regime("nn.MultiheadAttention", "models", lambda: Classifier(Attentive()), series, left_out=ATTENTION),
    Regime("nn.MultiheadAttention, fallback", "models", lambda: Classifier(Attentive()), series, influence=SLOWLY),
    Regime("ViT of bare parameters", "models", lambda: Classifier(Vision()), series, left_out=VISION),
    Regime("ViT, attention time first", "models", lambda: Classifier(Vision(False)), series, left_out=VISION),
    Regime(
        "ViT, bf16-mixed",
        "models",
        lambda: Classifier(Vision()),
        series,
        trainer=lambda: {"precision": "bf16-mixed"},
        tolerance=0.05,
        left_out=VISION,
    ),
    Regime(
        "ViT, accumulated and clipped",
        "models",
        lambda: Classifier(Vision()),
        series,
        trainer=lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        left_out=VISION,
    ),
    Regime("LSTM", "models", lambda: Classifier(Recurrent(nn.LSTM)), series),
    Regime("GRU", "models", lambda: Classifier(Recurrent(nn.GRU)), series),
    Regime("LSTM, two layers, packed sequences", "models", lambda: Classifier(Packed(nn.LSTM)), series),
    Regime("RNN, two layers, packed sequences", "models", lambda: Classifier(Packed(nn.RNN)), series),
    Regime("LSTMCell in a loop", "models", lambda: Classifier(Cells()), series),
    Regime("LSTM, checkpointed", "models", lambda: Classifier(Recurrent(nn.LSTM, checkpointed=True)), series),
    Regime(
        "LSTM, bf16-mixed",
        "models",
        lambda: Classifier(Recurrent(nn.LSTM)),
        series,
        trainer=lambda: {"precision": "bf16-mixed"},
        tolerance=0.05,
        supported=runs_recurrent_bf16,
    ),
    Regime(
        "LSTM, dropout between layers",
        "models",
        lambda: Classifier(Recurrent(nn.LSTM, num_layers=2, dropout=0.4)),
        series,
        shares="among",
        left_out=() if TELLS else RNN,
    ),
    Regime(
        "LSTM with a forward of its own, fallback",
        "models",
        lambda: Classifier(Recurrent(OwnLSTM)),
        series,
        influence=SLOWLY,
    ),
    Regime(
        "ResNet with BatchNorm",
        "models",
        lambda: Classifier(Residual()),
        pictures,
        shares="among",
        approximate=("net.norm", "net.inner", "net.outer"),
    ),
    Regime("two views of each row joined, convolutions", "models", lambda: Classifier(Views()), pictures),
]
