"""Scores of one fine-tuning: f-INE recorded in the run, influence functions at its end, and word overlap (BM25)."""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.family.recorded import Measured
from benchmarks.finetuning.model import Batch, FineTuning, token_loss, tokens
from benchmarks.finetuning.text import IGNORED, Task
from benchmarks.finetuning.truth import Kept
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses
from ine_callback import Recorder
from ine_callback.capture import Block
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import Spectrum, resolvent
from ine_callback.methods import FINE, FitContext, PerSamplePass
from ine_callback.optimizers.registry import rate_of
from ine_callback.queries.sources import DataSource

UPDATE = 16  # documents of a curvature update: few enough for K-FAC to take all of their positions
DAMPING = 0.1  # times the mean eigenvalue
CLOSES = "closing" in inspect.signature(FINE).parameters  # whether f-INE can end with a pass over the rows


@dataclass(frozen=True)
class Scores:
    """What a run says of the documents.

    Attributes:
        name: Of the score.
        values: Scores [N, Q], positive lowers the query.
        seconds: CPU seconds with the training.
        loss: The same in units of the loss [N, Q], where the score has them.
        in_sd: Whether ``values`` are in standard deviations of the query over trainings.
    """

    name: str
    values: Floats
    seconds: float
    loss: Floats | None = None
    in_sd: bool = False


@dataclass(frozen=True)
class Setting:
    """How a run is recorded; all else is the package's default."""

    closing: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def method(self) -> FINE:
        """Shifts in units of the loss are those of the visits, so they are kept where these make the score."""
        if self.closing:
            return FINE()
        options: dict[str, Any] = {"closing": False} if CLOSES else {}
        return Measured(**options)


FIRST_ORDER = "first order (discount=False)"
SETTINGS = {
    "f-INE, default": Setting(closing=CLOSES),
    **({"f-INE, closing=False": Setting()} if CLOSES else {}),
    "f-INE, reservoir=0": Setting(options={"reservoir": 0}),
    FIRST_ORDER: Setting(options={"discount": False}),
}


def of_run(kept: Kept, task: Task, seed: int, dropout: float) -> Iterator[Scores]:
    """All scores of one fine-tuning on all documents, but BM25, which needs none."""
    for name, setting in SETTINGS.items():
        yield recorded(name, setting, kept.finetuning(seed, dropout), task)
    yield from at_end(kept.finetuning(seed, dropout), task)


def recorded(name: str, setting: Setting, run: FineTuning, task: Task) -> Scores:
    """Fine-tunes with a recorder, as users do."""
    method, started = setting.method(), time.process_time()
    recorder = Recorder(
        run.model,
        run.optimizer,
        rows=len(task.x),
        queries={"document": RowLosses(task.xq, task.yq, token_loss)},
        loss=token_loss,
        methods=[method],
        total_steps=len(run.batches),
        schedulers=[(run.scheduler, 1)],
        initial_weights="fixed",
        on_error="raise",
        **setting.options,
    )

    def backward(rows: Tensor, batch: Batch) -> None:
        with recorder.batch(rows, batch):
            loss = token_loss(run.model, batch)
            recorder.see(loss)
            loss.backward()

    with recorder:
        run.run(backward)
    mu = recorder.report().scores.mu
    raw = method.raw.double().numpy() if isinstance(method, Measured) else None
    return Scores(name, mu, time.process_time() - started, raw, in_sd=True)


def at_end(run: FineTuning, task: Task) -> Iterator[Scores]:
    """Scores by the weights at the end of a run: TracIn and influence functions, K-FAC's Fisher with true labels.

    A document counts in the loss with its tokens: its gradient is weighted by its share of them. The influence is then
    ``share <q, (F + damping)^-1 g>`` in units of the loss. With damping 1 / R, R the summed learning rate times Adam's
    rate of the block, it tends to first order where R F is small.
    """
    started = time.process_time()
    run.run()
    end = context(run, task)
    share = (tokens(task.y) / tokens(task.y).sum()).double().numpy()[:, None]
    factors = curvature(end, task)
    queries = end.query_gradients()
    rates = {block: run.summed_lr * float(rate_of(run.optimizer, block.parameters).curvature) for block in queries}
    directions = {
        "TracIn at the end": queries,
        f"K-FAC at the end, damping {DAMPING:g} x mean": {
            block: factors.operator(block, relative(DAMPING)).apply(q) for block, q in queries.items()
        },
        "K-FAC at the end, damping 1 / R": {
            block: factors.operator(block, resolvent(1 / max(rates[block], 1e-30))).apply(q)
            for block, q in queries.items()
        },
    }
    before = time.process_time() - started
    for name, each in directions.items():
        started = time.process_time()
        found = share * contracted(end, each)
        known = None if each is queries else found
        yield Scores(name, found, before + time.process_time() - started, known)


def context(run: FineTuning, task: Task) -> FitContext:
    """The trained model with the documents and queries, as a fit-end method gets it."""
    loader = DataLoader(TensorDataset(task.x, task.y), batch_size=UPDATE)
    source = DataSource("finetuning", token_loss, loader)
    queries = RowLosses(task.xq, task.yq, token_loss).bind("document", source)
    return FitContext(run.model, queries, source, token_loss, owner="finetuning")


def curvature(end: FitContext, task: Task) -> KFAC:
    """Kronecker factors of the Fisher of the mean loss of a token, over all documents."""
    factors, counts = KFAC(), tokens(task.y)
    for part in torch.arange(len(task.x)).split(UPDATE):
        for rows, gradients in end.per_sample(PerSamplePass(rows=part.tolist())):
            for block in gradients:
                for sample in gradients.grad_samples(block):
                    factors.observe(block, sample, float(counts[rows].sum()))
            factors.end_step()
    return factors


def relative(damping: float) -> Spectrum:
    """``1 / (x + damping mean(x))``."""

    def spectrum(*values: Tensor) -> Tensor:
        x = math.prod(values[1:], start=values[0])
        return 1 / (x + damping * x.mean())

    return spectrum


def contracted(end: FitContext, directions: dict[Block, Tensor]) -> Floats:
    """Inner products [N, Q] of the documents' gradients, of the mean over their tokens, with directions."""
    found = [gradients.products(directions) for _, gradients in end.per_sample()]
    return torch.cat(found).double().numpy()


def bm25(task: Task, k: float = 1.5, b: float = 0.75) -> Scores:
    """Words in common, the rarer the better: the score that no training is needed for (Okapi BM25)."""
    started = time.process_time()
    rows, queries = ([Counter(y[y != IGNORED].tolist()) for y in part] for part in (task.y, task.yq))
    length = tokens(task.y).double().numpy()
    within = Counter(token for row in rows for token in row)
    out = np.zeros((len(rows), len(queries)))
    for place, query in enumerate(queries):
        for token in query.keys() & within.keys():
            count = np.array([row[token] for row in rows])
            rarity = math.log(1 + (len(rows) - within[token] + 0.5) / (within[token] + 0.5))
            out[:, place] += rarity * count * (k + 1) / (count + k * (1 - b + b * length / length.mean()))
    return Scores("BM25", out, time.process_time() - started)
