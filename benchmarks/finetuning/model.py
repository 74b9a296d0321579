"""A small GPT, its pre-training, and its fine-tuning from always the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.finetuning.text import IGNORED, Task

HEADS = 4
WEIGHT_DECAY = 0.01
Weights = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Training:
    """The network, and how it is trained.

    Attributes:
        width: Of the residual stream.
        depth: Blocks.
        pretraining: Steps of pre-training.
        lr: Highest learning rate of fine-tuning.
        epochs: Of fine-tuning.
        batch: Documents of a step.
        warmup: Fraction of the steps in which the learning rate rises; then it falls linearly.
    """

    width: int = 96
    depth: int = 3
    pretraining: int = 1000
    lr: float = 1e-3
    epochs: int = 3
    batch: int = 16
    warmup: float = 0.1


class Block(nn.Module):
    """Pre-norm transformer block with dropout on both branches."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        hidden = torch.full((length, length), -1e9).triu(1)
        mixed = (q @ k.mT / math.sqrt(width / HEADS) + hidden).softmax(-1) @ v
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(n, length, width)))
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))
        return out


class GPT(nn.Module):
    """Logits [n, L, V] of the next token; the head's weight is the tokens' embedding."""

    def __init__(self, vocabulary: int, length: int, training: Training, dropout: float = 0.0) -> None:
        super().__init__()
        width = training.width
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, dropout) for _ in range(training.depth)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).expand_as(x)
        out: Tensor = self.head(self.norm(self.blocks(self.drop(self.tokens(x) + self.positions(places)))))
        return out


def token_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean over the batch's tokens, as language models are trained; the padding does not count."""
    return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def document_losses(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over each document's tokens [n]."""
    losses = F.cross_entropy(module(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(y.shape).sum(1) / tokens(y)


def tokens(y: Tensor) -> Tensor:
    """Number of tokens of each document [n]."""
    return (y != IGNORED).sum(1)


def pretrain(task: Task, training: Training) -> Weights:
    """Weights after training on random pieces of the text's first half."""
    torch.manual_seed(0)
    length, steps = task.x.shape[1], training.pretraining
    model = GPT(task.vocabulary, length, training)
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=WEIGHT_DECAY)
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / 100, (steps - step) / steps))
    for _ in range(steps):
        starts = torch.randint(len(task.pretraining) - length, (32, 1))
        y = task.pretraining[starts + torch.arange(length)]
        optimizer.zero_grad()
        token_loss(model, (F.pad(y[:, :-1], (1, 0)), y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class FineTuning:
    """One fine-tuning of the pre-trained weights on some rows.

    Args:
        task: Documents.
        training: How.
        weights: Where it starts.
        rows: Documents to train on.
        seed: Of the order and of dropout.
        dropout: Probability.
    """

    def __init__(
        self, task: Task, training: Training, weights: Weights, rows: Tensor, seed: int, dropout: float
    ) -> None:
        self.task, self.seed = task, seed
        self.model = GPT(task.vocabulary, task.x.shape[1], training, dropout)
        self.model.load_state_dict(weights)
        g = torch.Generator().manual_seed(seed)
        orders = (rows[torch.randperm(len(rows), generator=g)] for _ in range(training.epochs))
        self.batches = [part for order in orders for part in order.split(training.batch)]
        self.optimizer = AdamW(self.model.parameters(), lr=training.lr, weight_decay=WEIGHT_DECAY)
        steps = len(self.batches)
        warm = max(1, round(training.warmup * steps))
        self.scheduler = LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        )
        self.summed_lr = 0.0

    def run(self, backward: Callable[[Tensor, Batch], None] | None = None) -> GPT:
        """Trains and returns the model, in evaluation mode.

        Args:
            backward: Forward and backward pass of a step, given its rows and their batch.
        """
        torch.manual_seed(self.seed)
        for rows in self.batches:
            batch = (self.task.x[rows], self.task.y[rows])
            self.optimizer.zero_grad()
            if backward is None:
                token_loss(self.model, batch).backward()
            else:
                backward(rows, batch)
            self.summed_lr += float(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.scheduler.step()
        return self.model.eval()
