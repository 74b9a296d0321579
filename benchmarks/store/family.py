"""Trainings like those of the family, on which the store was mended: Spearman with the same queries in the run.

What the store had to be mended for was seen on G2 and fine-tuning, which are held out; so these were made for it. From
fixed weights a network is trained before, on other rows of the same data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.family import tasks
from benchmarks.family.networks import Transformer, build, make_optimizer
from benchmarks.family.protocols import Protocol
from benchmarks.family.tasks import QUERIES, mean_loss
from benchmarks.metrics import per_query
from benchmarks.network import RowLosses
from benchmarks.recorded import recorded_step
from benchmarks.store.accuracy import again, everything, shortened
from ine_callback import GradientStore, Recorder
from ine_callback.recording.store.settings import StoredType

SEEDS = (402, 403)  # of the networks; 401 is that of the task, and was used while developing
TASK = 401
SIZES = (256, 512, 1024)  # bytes of a row, at which stores of these types are compared
TYPES: tuple[StoredType, ...] = ("int8", "mixed")
BEFORE, BATCH_BEFORE, RATE_BEFORE = 8, 25, 3e-3  # epochs, rows of a step and learning rate of the training before
_WIDE = Protocol(
    *("MLP, AdamW", "digits", 500, "mlp", 2, 128, True, "gelu"),
    *("torch", "adamw", "warmup", 3.0, 20, 6, 0.1),
)
_TEXT = Protocol(
    *("transformer", "characters", 448, "transformer", 2, 96, True, "gelu"),
    *("torch", "adamw", "cosine", 1.0, 16, 4, 0.0),
)
PROTOCOLS = (
    (_WIDE, "random"),
    (replace(_WIDE, name="MLP, SGD", rows=1600, norm=False, optimizer="momentum", schedule="cosine"), "random"),
    (replace(_WIDE, name="MLP, tuned"), "fixed"),
    (replace(_TEXT, name="transformer, tuned"), "fixed"),
    (replace(_TEXT, name="transformer with a tied head, tuned", width=64), "fixed"),
)


def all_of(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each training's name, and how well its store ranks rows as the run did, mean over the seeds."""
    for protocol, weights in PROTOCOLS[::4] if quick else PROTOCOLS:
        small = replace(protocol, rows=4 * protocol.batch, epochs=2) if quick else protocol
        found = [asked(small, weights, seed) for seed in (SEEDS[:1] if quick else SEEDS)]
        yield protocol.name, {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def asked(protocol: Protocol, weights: str, seed: int) -> dict[str, float]:
    """One recorded run: the default store, and others of the same vectors."""
    x, y, before = _data(protocol)
    rows, asked_of = slice(protocol.rows), slice(protocol.rows, protocol.rows + QUERIES)
    model, g = build(protocol, seed), torch.Generator().manual_seed(seed)
    if "tied" in protocol.name:
        assert isinstance(model, Transformer)
        model.head.weight = model.tokens.weight
    if weights == "fixed":
        _train(model, *before, g)
    optimizer, scheduler = make_optimizer(protocol, model.parameters(), protocol.steps)
    started = time.process_time()
    recorder = Recorder(
        *(model, optimizer, protocol.rows, {"row": RowLosses(x[asked_of], y[asked_of], mean_loss)}, mean_loss),
        total_steps=protocol.steps,
        schedulers=[] if scheduler is None else [(scheduler, 1)],
        initial_weights="fixed" if weights == "fixed" else "random",
        store=GradientStore(),
        on_error="raise",
    )
    with recorder:
        for _ in range(protocol.epochs):
            for some in torch.randperm(protocol.rows, generator=g).split(protocol.batch):
                recorded_step(recorder, model, optimizer, mean_loss, some, (x[rows][some], y[rows][some]), scheduler)
    store = recorder.store
    assert store is not None
    whole, _ = everything(store, recorder.report)
    mu, default = recorder.report().scores.mu, GradientStore()
    parameters = sum(p.numel() for p in model.parameters())
    found: dict[str, float] = {"parameters": parameters, "working": store.final.size}
    for size in SIZES:
        for dtype in TYPES:
            short = shortened(whole, GradientStore(size, dtype))
            spearman = per_query(again(store, short), mu)
            found[f"{size} {dtype}"] = float(np.nanmean(spearman))
            if (size, dtype) == (default.bytes_per_row, default.dtype):
                found["spearman"] = float(np.nanmean(spearman))
                found["worst_tenth"] = float(np.nanquantile(spearman, 0.1))
    return found | {"seconds": time.process_time() - started}


def _data(protocol: Protocol) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Rows and, behind them, queries; and the others, for the training before."""
    g = torch.Generator().manual_seed(TASK)
    x, y = tasks.SOURCES[protocol.data]()
    order = torch.randperm(len(x), generator=g)
    x, y = x[order], y[order].clone()
    last = protocol.rows + QUERIES
    others = x[last:], y[last:].clone()
    if protocol.flipped:
        bad = torch.where(torch.rand(protocol.rows, generator=g) < protocol.flipped)[0]
        y[bad] = (y[bad] + torch.randint(1, 10, y[bad].shape, generator=g)) % 10
    return x[:last], y[:last], others


def _train(model: nn.Module, x: Tensor, y: Tensor, g: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE_BEFORE)
    for _ in range(BEFORE):
        for rows in torch.randperm(len(x), generator=g).split(BATCH_BEFORE):
            optimizer.zero_grad()
            mean_loss(model, (x[rows], y[rows])).backward()
            optimizer.step()
