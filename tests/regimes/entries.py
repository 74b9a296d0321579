"""Regimes in which rows do not lead: graphs, packed texts, experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.entries import Batch, GraphNet, next_token, rows_of_graphs
from tests.helpers.oracle import TELLS

from .models import series
from .regime import CLASSES, ROWS, Classifier, Data, Item, Regime, classes, vectors

SIZES = ((3, 4), (2, 5), (2, 2, 3), (4, 3))  # of the texts of a sequence
LETTERS = 7


def molecules() -> Data:
    """Graphs of 2 to 5 nodes, each padded to 5 as an item."""

    def draw(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 5, 6, generator=generator), classes(generator, rows)

    def collate(items: list[Item]) -> Batch:
        return Batch([(x[: 2 + row % 4], int(y), row) for x, y, row in items])

    return vectors(collate=collate, rows_of=lambda batch: batch.row, draw=draw)


class OfGraphs(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch), batch.y)


class TokenModel(nn.Module):
    """Attention within each text; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(LETTERS, 5), nn.LayerNorm(5), nn.Linear(5, 5)
        self.attention, self.head = nn.Linear(5, 15), nn.Linear(5, LETTERS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, texts: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.attention(self.norm(x)).chunk(3, -1)
        before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask = (texts[:, :, None] == texts[:, None, :]) & before
        x = x + torch.tanh(self.up((q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v))
        return self.head(x)


class OfTexts(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return next_token(self.net, batch)

    def terms(self, single: Any) -> int:
        return single[0].shape[1] - 1


Sequences = list[tuple[Tensor, Tensor]]  # token ids [T] and the text of each [T]


def packed() -> Data:
    """20 texts and more, packed into sequences of 7 tokens, with an eighth of none."""
    generator = torch.Generator().manual_seed(3)
    sequences: Sequences = []
    texts: Sequences = []
    while len(texts) < ROWS:
        ids, of = [], []
        for size in SIZES[len(sequences) % len(SIZES)]:
            text = torch.randint(LETTERS, (size,), generator=generator)
            of.append(torch.full((size,), len(texts)))
            texts.append((text, of[-1]))
            ids.append(text)
        sequences.append((torch.cat([*ids, torch.zeros(1).long()]), torch.cat([*of, torch.tensor([-1])])))
    train = DataLoader(sequences, 3, shuffle=True)
    val = DataLoader(sequences[:4], 4)
    # of several texts, which are never read as one batch, the first stands for all
    return Data(train, texts, val, lambda items: torch.utils.data.default_collate(items[:1]), rows_of_texts)


def rows_of_texts(batch: Any) -> list[int]:
    return [row for row in batch[1].unique().tolist() if row >= 0]


TEXTS = len(packed().items)


class Experts(nn.Module):
    """One layer of experts, of whom two see each token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False), nn.Linear(6, CLASSES)
        layers = lambda: (nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))  # noqa: E731
        self.experts = nn.ModuleList(nn.Sequential(*layers()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, -1)
        out = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            token, place = torch.where(chosen == k)
            out = out.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
        return self.head((x + out.view_as(x)).mean(1))


GROUP = "entries of rows"
BARE = () if TELLS else ("net.attention",)
ROUTED = tuple(f"net.experts.{k}.{j}.{name}" for k in range(3) for j in (0, 2) for name in ("weight", "bias"))
ENTRIES = [
    Regime(
        "graphs: nodes, edges",
        GROUP,
        lambda: OfGraphs(GraphNet()),
        molecules,
        influence={"row_fn": rows_of_graphs, "num_rows": ROWS},
        left_out=BARE,
    ),
    Regime(
        "graphs, accumulated and clipped",
        GROUP,
        lambda: OfGraphs(GraphNet()),
        molecules,
        trainer=lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        influence={"row_fn": rows_of_graphs, "num_rows": ROWS},
        left_out=BARE,
    ),
    Regime(
        "packed texts",
        GROUP,
        lambda: OfTexts(TokenModel()),
        packed,
        influence={"row_fn": lambda batch: batch[1], "num_rows": TEXTS},
    ),
    Regime("mixture of experts", GROUP, lambda: Classifier(Experts()), series, left_out=() if TELLS else ROUTED),
]
