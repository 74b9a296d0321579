"""What one score costs, a training row for a query: AirRep beside gradients of a transformer of GPT-2's kind.

Counted are floating-point operations (torch's FlopCounterMode, matrix products and attention) and CPU seconds of one
thread, for one row of 128 tokens and one query:

- gradient: forward and backward pass of the row in the transformer (12 layers of width 256), in batches, and the
  product of its gradient with a query's; a batch's backward pass is taken as the price of its rows' gradients, which is
  less than they cost;
- small encoder: forward pass of the row in a transformer of one layer of width 64, mean over tokens, projection to 64,
  and a dot product of 64 numbers;
- default encoder: forward pass in the large transformer for its penultimate features, then the same;
- stored: the dot product alone, for every further query of a row that was embedded before.

The trainings on subsets that the encoder is learned from are not in these numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TOKENS, VOCABULARY, WIDTH, REPEATS = 128, 2000, 64, 5


class Transformer(nn.Module):
    """Causal, pre-norm, with a head of ``outputs``."""

    def __init__(self, layers: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def features(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        found: Tensor = self.layers(x, mask=mask, is_causal=True)
        return found


def prices(quick: bool) -> dict[str, dict[str, float]]:
    """GFLOP and CPU seconds of one score, by the way it is made."""
    torch.manual_seed(0)
    layers, batch = (2, 4) if quick else (12, 16)
    large, small = Transformer(layers, 256, VOCABULARY), Transformer(1, 64, WIDTH)
    project = nn.Linear(256, WIDTH)
    tokens = torch.randint(VOCABULARY, (batch, TOKENS))
    query, direction = torch.randn(WIDTH), [torch.randn_like(p) for p in large.parameters()]
    stored = torch.randn(100_000, WIDTH)

    def gradient() -> Any:
        logits = large.head(large.features(tokens))[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        found = torch.autograd.grad(loss, list(large.parameters()))
        return [sum((a * b).sum() for a, b in zip(found, direction, strict=True)) for _ in range(batch)]

    @torch.no_grad()
    def by_small() -> Any:
        return small.head(small.features(tokens).mean(1)) @ query

    @torch.no_grad()
    def by_default() -> Any:
        return project(large.features(tokens).mean(1)) @ query

    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see it
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "gradient of the row and its product": (gradient, batch),
        "default encoder and dot product": (by_default, batch),
        "small encoder and dot product": (by_small, batch),
        "dot product of stored embeddings": (
            lambda: stored @ query[:, None],
            len(stored),
        ),  # the counter knows matrices alone
    }
    try:
        return {name: _price(way, rows) for name, (way, rows) in ways.items()}
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _price(way: Callable[[], Any], rows: int) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter:
        way()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        way()
        seconds.append(time.process_time() - start)
    return {"gflop": counter.get_total_flops() / rows / 1e9, "seconds": float(np.median(seconds)) / rows}
