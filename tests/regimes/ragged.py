"""Regimes of rows of different lengths without padding: nested tensors, and bags of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .optimizers import Together
from .regime import CLASSES, Classifier, Data, Item, Regime, classes, vectors

WORDS, LONGEST = 7, 5


def _words(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(WORDS, (rows, LONGEST), generator=generator), classes(generator, rows)


def _batch(x: Tensor, items: list[Item]) -> tuple[Tensor, Tensor, Tensor]:
    return x, torch.stack([y for _, y, _ in items]), torch.tensor([row for *_, row in items])


def nested() -> Data:
    """Rows of one to five words as a nested tensor."""

    def collate(items: list[Item]) -> tuple[Tensor, Tensor, Tensor]:
        words = [x[: 1 + row % LONGEST] for x, _, row in items]
        return _batch(torch.nested.nested_tensor(words, layout=torch.jagged), items)

    return vectors(collate=collate, draw=_words)


def padded() -> Data:
    """Such rows, padded with -1."""

    def collate(items: list[Item]) -> tuple[Tensor, Tensor, Tensor]:
        there = torch.arange(LONGEST)
        return _batch(torch.stack([x.where(there <= row % LONGEST, -1) for x, _, row in items]), items)

    return vectors(collate=collate, draw=_words)


class Attending(nn.Module):
    """A block of attention on a nested tensor, and the mean over each row's words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.inside = nn.Embedding(WORDS, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        parts = (each.contiguous() for each in self.inside(self.norm(x)).chunk(3, -1))
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in parts)
        found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.head(torch.tanh(x + self.out(found)).to_padded_tensor(0.0).sum(1))


class Bag(nn.Module):
    """A ragged bag of each row's words by offsets; each word has a weight."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, 6, mode="sum", sparse=sparse)

    def forward(self, words: Tensor) -> Tensor:
        lengths, flat = (words >= 0).sum(1), words[words >= 0]
        found: Tensor = self.bag(flat, lengths.cumsum(0) - lengths, (1.0 + flat).rsqrt())
        return found


def bags(sparse: bool = False) -> nn.Sequential:
    return nn.Sequential(Bag(sparse), nn.Tanh(), nn.Linear(6, CLASSES))


def sparse_bags() -> Classifier:
    makes = (lambda p: torch.optim.SparseAdam(p, lr=0.03), lambda p: torch.optim.AdamW(p, lr=0.01))
    return Together(makes, bags(sparse=True), at=1)


GROUP = "rows of different lengths"
RAGGED = [
    Regime("nested tensors, attention", GROUP, lambda: Classifier(Attending()), nested),
    Regime("EmbeddingBag, ragged and weighted", GROUP, lambda: Classifier(bags()), padded),
    Regime("EmbeddingBag, sparse, SparseAdam and AdamW", GROUP, sparse_bags, padded),
]
