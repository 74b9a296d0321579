"""The networks of the family, their optimizers and schedules: the same modules for the truth and for recorded runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from benchmarks.family.protocols import DATA, Protocol
from benchmarks.family.tasks import LENGTH, VOCABULARY


class Attention(nn.Module):
    """Self-attention with two heads; causal where each position predicts the next token."""

    def __init__(self, width: int, causal: bool, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = q @ k.mT / math.sqrt(width / self.heads)
        if self.causal:
            hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            weights = weights.masked_fill(hidden, -1e4)
        mixed: Tensor = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
        return mixed


class Block(nn.Module):
    """Pre-norm transformer block with a hidden layer of twice the width."""

    def __init__(self, width: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, causal)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), _activation(activation), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(x)
        return out


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and a head on each position (``causal``) or on their mean."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__()
        self.causal, width = protocol.data == "characters", protocol.width
        self.tokens = nn.Embedding(VOCABULARY[protocol.data], width)
        self.positions = nn.Embedding(LENGTH[protocol.data], width)
        blocks = [Block(width, self.causal, protocol.activation) for _ in range(protocol.depth)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, DATA[protocol.data][2])

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        hidden = self.norm(self.blocks(self.tokens(x) + self.positions(places)))
        out: Tensor = self.head(hidden if self.causal else hidden.mean(1))
        return out


def build(protocol: Protocol, seed: int) -> nn.Module:
    """A network with its initial weights; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = {"mlp": _mlp, "cnn": _cnn, "transformer": Transformer}[protocol.network](protocol)
        if protocol.init != "torch":
            gain = 2.0 if protocol.init == "he" else 1.0
            for part in module.modules():
                if isinstance(part, (nn.Linear, nn.Conv2d)) and part.bias is not None:
                    nn.init.normal_(part.weight, std=math.sqrt(gain / part.weight[0].numel()))
                    nn.init.zeros_(part.bias)
    return module


def _activation(name: str) -> nn.Module:
    return nn.GELU() if name == "gelu" else nn.ReLU()


def _mlp(protocol: Protocol) -> nn.Module:
    _, inputs, outputs = DATA[protocol.data]
    layers: list[nn.Module] = []
    for _ in range(protocol.depth):
        layers.append(nn.Linear(inputs, protocol.width))
        if protocol.norm:
            layers.append(nn.LayerNorm(protocol.width))
        layers.append(_activation(protocol.activation))
        inputs = protocol.width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _cnn(protocol: Protocol) -> nn.Module:
    """Convolutions 3 x 3 with pooling to 4 x 4 after the first one, then a linear layer."""
    channels, width = 1, protocol.width
    layers: list[nn.Module] = []
    for k in range(protocol.depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), _activation(protocol.activation)]
        if k == 0:
            layers.append(nn.AvgPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, DATA[protocol.data][2]))


def make_optimizer(
    protocol: Protocol, parameters: Iterable[Tensor], steps: int
) -> tuple[Optimizer, LRScheduler | None]:
    """The optimizer, and the schedule of its learning rate over ``steps`` steps."""
    optimizer: Optimizer
    if protocol.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=protocol.rate)
    else:
        optimizer = torch.optim.SGD(parameters, lr=protocol.rate, momentum=0.9 * (protocol.optimizer == "momentum"))
    if protocol.schedule == "constant":
        return optimizer, None
    if protocol.schedule == "cosine":
        return optimizer, CosineAnnealingLR(optimizer, steps)
    warm = max(1, steps // 10)

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return optimizer, LambdaLR(optimizer, share)
