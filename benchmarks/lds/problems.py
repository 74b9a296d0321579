"""The problems: rows, queries, the halves of the rows, a network and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.data import digits, table, text
from ine_callback.queries import margins

SUBSETS = 60
QUICK_ROWS, QUICK_SUBSETS = 256, 12


@dataclass(frozen=True)
class Problem:
    """Rows x, y and queries xq, yq; ``network()`` maps x to logits [b, C] or, for text, [b, C, positions].

    ``hessian_rows``: How many rows the peers' conjugate gradients may afford (all, where layers are linear).
    ``projections``: Dimensions of TRAK's projection; more than a third of the rows ruin it, as it has no damping.
    """

    name: str
    what: str
    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor
    subsets: Tensor
    network: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    lr: float
    batch: int
    epochs: int
    hessian_rows: int
    projections: tuple[int, ...] = (512,)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch on all rows; rows that fill no batch wait for the next epoch."""
        return len(self.x) // self.batch


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row [b], for text its mean over positions; squared error of numbers."""
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square()
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses if losses.dim() == 1 else losses.mean(1)


def row_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of the true class of each row [b], for text its mean over positions; of numbers the prediction."""
    if labels.is_floating_point():
        return logits[:, 0]
    found = margins(logits, labels)
    return found if found.dim() == 1 else found.mean(1)


def mlp(inputs: int, dropout: float) -> nn.Module:
    """dattri's MNIST network: inputs-128-64-10; without dropout, protocol G2's."""
    layers = [nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    if dropout:
        layers[2:2], layers[5:5] = [nn.Dropout(dropout)], [nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def linear(inputs: int) -> nn.Module:
    """Logistic regression."""
    return nn.Sequential(nn.Linear(inputs, 10))


def regressor(sizes: Sequence[int]) -> nn.Module:
    """MLP with ReLU between layers of these sizes."""
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn(side: int) -> nn.Module:
    """Two strided convolutions and a linear layer, for images given as flat rows."""
    stride = 2 if side > 8 else 1
    last = side // stride**2
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        *(nn.Conv2d(1, 8, 5, stride=stride, padding=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=stride, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * last * last, 10)),
    )


class Attention(nn.Module):
    """Causal self-attention, spelled out so that it stacks under vmap."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weight = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        ahead = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        mixed = weight.masked_fill(ahead, float("-inf")).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, width))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A character model: characters [b, t] to logits of the next one [b, characters, t]."""

    def __init__(self, characters: int, context: int, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.characters, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        h = self.characters(x) + self.position(torch.arange(x.shape[1], device=x.device).expand_as(x))
        out: Tensor = self.out(self.norm(self.blocks(h))).transpose(1, 2)
        return out


def sgd(parameters: Iterable[Tensor], lr: float, momentum: float) -> Optimizer:
    """Plain SGD; a module-level function, so that a problem can travel to another process."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adamw(parameters: Iterable[Tensor], lr: float) -> Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def halves(n: int, count: int, g: torch.Generator) -> Tensor:
    """Random halves of n rows, [count, n / 2]."""
    return torch.stack([torch.randperm(n, generator=g)[: n // 2] for _ in range(count)])


def of_digits(path: Path | None, name: str, quick: bool) -> Problem:
    """A problem on MNIST or scikit-learn's digits; every random choice is seeded."""
    x, y = digits(path)
    x = (x - 0.1307) / 0.3081
    side = round(x.shape[1] ** 0.5)
    what: str
    network: Callable[[], nn.Module]
    what, network, lr, momentum, rows, queries, epochs = {
        "g2": ("MLP 784-128-64-10, SGD .01, momentum .9", partial(mlp, side * side, 0.0), 0.01, 0.9, 5000, 50, 50),
        "mlp": ("the same with dropout .1 (dattri's)", partial(mlp, side * side, 0.1), 0.01, 0.9, 5000, 50, 50),
        "logistic": ("logistic regression, SGD .01 (dattri's)", partial(linear, side * side), 0.01, 0.0, 5000, 50, 20),
        "cnn": (
            "two convolutions and a linear layer, SGD .02, momentum .9",
            partial(cnn, side),
            0.02,
            0.9,
            2000,
            50,
            15,
        ),
    }[name]
    n = min(QUICK_ROWS if quick else rows, len(x) * 2 // 3)
    g = torch.Generator().manual_seed(11)
    order = torch.randperm(len(x), generator=g)
    subsets = halves(n, QUICK_SUBSETS if quick else SUBSETS, g)
    train, held_out = order[:n], order[n : n + queries]
    return Problem(
        name=name,
        what=what,
        x=x[train],
        y=y[train],
        xq=x[held_out],
        yq=y[held_out],
        subsets=subsets,
        network=network,
        optimizer=partial(sgd, lr=lr, momentum=momentum),
        lr=lr / (1 - momentum),
        batch=64,
        epochs=3 if quick else epochs,
        hessian_rows=min(n, 500) if name == "cnn" else n,
    )


def of_text(path: Path | None, quick: bool, context: int = 32, rows: int = 1000, queries: int = 50) -> Problem:
    """Predicting the next character: every row is a piece of text of ``context`` characters."""
    written = text(path)
    letters = {c: k for k, c in enumerate(sorted(set(written)))}
    codes = torch.tensor([letters[c] for c in written])
    rows, queries = (QUICK_ROWS // 4, 10) if quick else (min(rows, len(codes) // context * 2 // 3), queries)
    g = torch.Generator().manual_seed(12)
    starts = torch.randperm(len(codes) // context - 1, generator=g)[: rows + queries] * context
    pieces = codes[starts[:, None] + torch.arange(context + 1)]
    x, y = pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
    return Problem(
        name="transformer",
        what=f"character transformer, 2 blocks of width 32, {context} characters a row, AdamW 3e-3",
        x=x[:rows],
        y=y[:rows],
        xq=x[rows:],
        yq=y[rows:],
        subsets=halves(rows, QUICK_SUBSETS if quick else SUBSETS, g),
        network=partial(Transformer, len(letters), context),
        optimizer=partial(adamw, lr=3e-3),
        lr=3e-3,
        batch=25,
        epochs=1 if quick else 15,
        hessian_rows=min(rows, 500),
    )


def of_table(name: str, quick: bool) -> Problem:
    """Regression on one of scikit-learn's tables, by squared error."""
    x, y = table(name)
    what, layers, optimizer, lr, rows, epochs = {
        "diabetes": ("MLP 10-32-32-1, AdamW 3e-3", (10, 32, 32, 1), partial(adamw, lr=3e-3), 3e-3, 380, 10),
        "friedman": (
            "MLP 10-64-1, SGD .01, momentum .9",
            (10, 64, 1),
            partial(sgd, lr=0.01, momentum=0.9),
            0.1,
            1000,
            20,
        ),
    }[name]
    g = torch.Generator().manual_seed(14)
    order = torch.randperm(len(x), generator=g)
    n = QUICK_ROWS if quick else rows
    train, held_out = order[:n], order[n : n + 50]
    return Problem(
        name=name,
        what=f"regression: {what}",
        x=x[train],
        y=y[train],
        xq=x[held_out],
        yq=y[held_out],
        subsets=halves(n, QUICK_SUBSETS if quick else SUBSETS, g),
        network=partial(regressor, layers),
        optimizer=optimizer,
        lr=lr,
        batch=19 if name == "diabetes" else 25,
        epochs=3 if quick else epochs,
        hessian_rows=n,
        projections=(32, 64, 128),
    )


def load(path: Path | None, name: str, quick: bool) -> Problem:
    """The problem of that name; ``quick`` cuts its rows, halves and epochs."""
    if name in TABLES:
        return of_table(name, quick)
    return of_text(path, quick) if name == "transformer" else of_digits(path, name, quick)


TABLES = ("diabetes", "friedman")
NAMES = ("g2", "mlp", "logistic", "cnn", "transformer", *TABLES)
