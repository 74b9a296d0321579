"""A small causal transformer: trained with or without suppressed tokens, read for perplexity and for what it writes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.metrics import Floats
from benchmarks.tokens.problems import Problem
from ine_callback import suppressed_cross_entropy

BATCH, RATE, CLIP = 64, 3e-3, 1.0


class Transformer(nn.Module):
    """One block with two heads."""

    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Linear(width, words),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mixed(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = self.head(x + self.down(F.gelu(self.up(self.after(x)))))
        return out


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the tokens with a label."""
    return F.cross_entropy(model(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())


def trained(
    p: Problem, seed: int, mask: Tensor | None = None, rows: Tensor | None = None, width: int | None = None
) -> Transformer:
    """A model of the problem's texts, without the tokens of ``mask`` [N, T] or of ``rows`` alone."""
    torch.manual_seed(seed)
    model = Transformer(p.words, width or p.width, p.texts.shape[1] + p.length)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    texts = p.texts if rows is None else p.texts[rows]
    for step in range(p.steps):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / p.steps))
        which = torch.randint(len(texts), (BATCH,))
        logits, labels = model(texts[which])[:, :-1], texts[which][:, 1:]
        chosen = torch.zeros_like(labels, dtype=torch.bool) if mask is None else mask[which][:, 1:]
        optimizer.zero_grad()
        suppressed_cross_entropy(logits, labels, chosen).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def judged(p: Problem, model: nn.Module) -> dict[str, float]:
    """Share of written texts with unwanted passages, and perplexity of clean ones."""
    generator, written = torch.Generator().manual_seed(4), p.starts
    for _ in range(p.length):
        last = model(written)[:, -1].softmax(-1)
        written = torch.cat([written, torch.multinomial(last, 1, generator=generator)], 1)
    unwanted: Floats = p.writes(written).astype(float)
    return {"unwanted": float(unwanted.mean()), "perplexity": float(loss_of(model, (p.clean, p.clean)).exp())}
