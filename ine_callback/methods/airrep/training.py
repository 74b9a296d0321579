"""Trains the encoder on the ranking of subsets, with a gradient cache: memory is that of one batch of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from torch import Tensor, nn

from ine_callback.methods.airrep.encoder import Batch, Read, embed, embedding
from ine_callback.methods.airrep.ranking import pairwise_loss, pooled
from ine_callback.methods.airrep.settings import AirRepSettings, Pooling

QUERIES, SUBSETS = 64, 32  # of a step; the paper has 1,000 of 10,000 queries, and 32 subsets
GRADIENT_NORM = 1.0  # greatest, as published


def train(
    encoder: nn.Module,
    read_queries: Read,
    read_rows: Read,
    queries: Tensor,
    subsets: Tensor,
    helpfulness: Tensor,
    settings: AirRepSettings,
    progress: bool = True,
) -> list[float]:
    """Trains the encoder, which is in evaluation mode: a row's embedding is the same in both passes of the cache.

    Args:
        encoder: Maps a batch to [b, d]; parameters that need gradients are trained.
        read_queries: Reads dev rows.
        read_rows: Reads training rows.
        queries: Dev rows to train on [Q].
        subsets: Training rows of each subset [M, n].
        helpfulness: Targets [Q, M].
        settings: Steps, pooling, learning rate, rows at once, seed.
        progress: Whether a bar is shown.

    Returns:
        The loss of each step.
    """
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    g = torch.Generator().manual_seed(settings.seed)
    losses = []
    for _ in track(range(settings.steps), description="AirRep: encoder", disable=not progress):
        q = torch.randperm(len(queries), generator=g)[:QUERIES]
        m = torch.randperm(len(subsets), generator=g)[:SUBSETS]
        rows, places = subsets[m].unique(return_inverse=True)
        parts = [read_queries(queries[q]), *(read_rows(part) for part in rows.split(settings.rows_at_once))]
        loss_of = ranking(len(q), places, helpfulness[q][:, m], settings.pooling)
        optimizer.zero_grad()
        losses.append(backward(encoder, parts, loss_of, cached=len(rows) > settings.rows_at_once))
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()
    optimizer.zero_grad()
    return losses


def ranking(queries: int, places: Tensor, helpfulness: Tensor, pooling: Pooling) -> Callable[[Tensor], Tensor]:
    """The ranking loss as a function of embeddings [queries + rows, d], subset m's rows being at ``places[m]``."""

    def loss_of(embeddings: Tensor) -> Tensor:
        found = pooled(embeddings[:queries], embeddings[queries:][places], pooling)
        return pairwise_loss(found, helpfulness.to(found))

    return loss_of


def backward(encoder: nn.Module, batches: Sequence[Batch], loss_of: Callable[[Tensor], Tensor], cached: bool) -> float:
    """Adds the exact gradient of a loss of all batches' embeddings, and returns the loss.

    Cached, embeddings are made without a graph, the loss gives their gradient, and each batch is then encoded once more
    to pass it on: only one batch's graph is in memory at a time (Gao et al., arXiv 2101.06983).
    """
    if not cached:
        loss = loss_of(torch.cat([embedding(encoder, batch) for batch in batches]))
        loss.backward()
        return float(loss.detach())
    with torch.no_grad():
        parts = [embedding(encoder, batch) for batch in batches]
    whole = torch.cat(parts).requires_grad_()
    loss = loss_of(whole)
    loss.backward()
    assert whole.grad is not None
    for batch, gradient in zip(batches, whole.grad.split([len(part) for part in parts]), strict=True):
        embedding(encoder, batch).backward(gradient)
    return float(loss.detach())


def score(
    encoder: nn.Module, read_queries: Read, read_rows: Read, queries: Tensor, subsets: Tensor, pooling: Pooling
) -> Tensor:
    """Scores f [Q, M] of subsets [M, n] for dev rows [Q], without gradients."""
    rows, places = subsets.unique(return_inverse=True)
    return pooled(embed(encoder, read_queries, queries), embed(encoder, read_rows, rows)[places], pooling)
