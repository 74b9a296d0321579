"""The protocols: one recorded training each, and what judges scores [N, Q] by retraining, where that is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks import g1
from benchmarks.finetuning.judge import lds
from benchmarks.finetuning.model import Batch, Training, token_loss
from benchmarks.finetuning.text import Sizes, make
from benchmarks.finetuning.truth import Counts, Kept
from benchmarks.lds import problems, retrain
from benchmarks.lds.problems import row_losses
from benchmarks.metrics import Floats, agreement, per_query_spearman
from benchmarks.network import RowLosses, cross_entropy, network
from benchmarks.recorded import recorded_step
from ine_callback import GradientStore, Recorder
from ine_callback.recording.store.recording import StoreRecording

Judge = Callable[[Floats], float]
NAMES = ("g1-sgd", "g1-adamw", "g2", "ft")


@dataclass(frozen=True)
class Recorded:
    """One recorded training.

    Attributes:
        name: Of the protocol.
        recorder: It has the store's working vectors.
        seconds: CPU seconds of the training's steps.
        judge: Spearman correlation with retraining (over groups, or LDS), mean over queries; None: nobody asked.
    """

    name: str
    recorder: Recorder
    seconds: float
    judge: Judge | None

    @property
    def store(self) -> StoreRecording:
        """Its store."""
        assert self.recorder.store is not None
        return self.recorder.store


def record(
    name: str, settings: GradientStore, data: Path | None, truth: Path, quick: bool, judged: bool = True
) -> Recorded:
    """Trains with a store; the truth is kept in the folder ``truth``, and found when a score is judged first."""
    make_run = {"g2": _g2, "ft": _ft}.get(name, _g1)
    run, judge = make_run(name, data, truth, quick)
    return Recorded(name, *run(settings), judge if judged else None)


Run = Callable[[GradientStore], tuple[Recorder, float]]


def _g1(name: str, data: Path | None, truth: Path, quick: bool) -> tuple[Run, Judge]:
    kind, problem = name.removeprefix("g1-"), g1.load(data)
    file = truth / f"{name}{'-quick' if quick else ''}.pt"
    known = cache(lambda: g1.truth(kind, 8 if quick else 96, problem, file).mu)
    groups = [group.numpy() for group in problem.groups]

    def run(store: GradientStore) -> tuple[Recorder, float]:
        g = torch.Generator().manual_seed(0)
        model = network(g)
        optimizer, scheduler = g1.make_optimizer(kind, model.parameters(), g1.STEPS)
        recorder = Recorder(
            *(model, optimizer, g1.ROWS, {"row": RowLosses(problem.xq, problem.yq)}, cross_entropy),
            total_steps=g1.STEPS,
            schedulers=[] if scheduler is None else [(scheduler, 1)],
            store=store,
            on_error="raise",
        )
        recorder.start()
        started = time.process_time()
        for _ in range(g1.EPOCHS):
            for rows in torch.randperm(g1.ROWS, generator=g).split(g1.BATCH):
                batch = (problem.x[rows], problem.y[rows])
                recorded_step(recorder, model, optimizer, cross_entropy, rows, batch, scheduler)
        seconds = time.process_time() - started
        recorder.stop()
        return recorder, seconds

    return run, lambda mu: agreement(mu, known(), groups)["spearman_per_query"]


def g2(data: Path | None, truth: Path, quick: bool) -> tuple[problems.Problem, Floats]:
    """Protocol G2, and the queries' losses [halves, Q] after one training on each half of the rows."""
    problem = problems.load(data, "g2", quick)
    return problem, retrain.halves(problem, 1, truth / f"g2{'-quick' if quick else ''}.pt")[0, :, 0].numpy()


def _g2(name: str, data: Path | None, truth: Path, quick: bool) -> tuple[Run, Judge]:
    problem = problems.load(data, "g2", quick)
    outcome = cache(lambda: g2(data, truth, quick)[1])

    def loss_of(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return row_losses(module(batch[0]), batch[1]).mean()

    def run(store: GradientStore) -> tuple[Recorder, float]:
        torch.manual_seed(0)
        model = problem.network()
        optimizer, steps = problem.optimizer(model.parameters()), problem.steps_per_epoch
        recorder = Recorder(
            *(model, optimizer, len(problem.x), {"row": RowLosses(problem.xq, problem.yq, loss_of)}, loss_of),
            total_steps=problem.epochs * steps,
            store=store,
            on_error="raise",
        )
        recorder.start()
        started = time.process_time()
        for _ in range(problem.epochs):
            for rows in torch.randperm(len(problem.x)).split(problem.batch)[:steps]:
                batch = (problem.x[rows], problem.y[rows])
                recorded_step(recorder, model, optimizer, loss_of, rows, batch)
        seconds = time.process_time() - started
        recorder.stop()
        return recorder, seconds

    def judge(mu: Floats) -> float:
        return per_query_spearman(-np.stack([mu[s.numpy()].sum(0) for s in problem.subsets]), outcome())

    return run, judge


def _ft(name: str, data: Path | None, truth: Path, quick: bool) -> tuple[Run, Judge]:
    from dataclasses import replace

    from benchmarks import data as texts
    from benchmarks.finetuning.__main__ import QUICK, SIZES

    sizes: Sizes = QUICK if quick or data is None else SIZES
    training, counts = Training(), Counts(seeds=1, all_rows=2)
    text = texts.text(data)
    if sizes is QUICK:
        training, counts = replace(training, width=16, depth=1, pretraining=20, epochs=2), Counts(6, 1, 2)
        text = texts.excerpt().replace("\n", "\n\n")
    task = make(text, sizes)
    kept = Kept(task, training, counts, None if sizes is QUICK else truth / f"{name}.pt")
    known = cache(lambda: kept.truth(0.0))

    def run(store: GradientStore) -> tuple[Recorder, float]:
        tuned = kept.finetuning(101, 0.0)
        recorder = Recorder(
            *(tuned.model, tuned.optimizer, len(task.x), {"document": RowLosses(task.xq, task.yq, token_loss)}),
            loss=token_loss,
            total_steps=len(tuned.batches),
            schedulers=[(tuned.scheduler, 1)],
            initial_weights="fixed",
            store=store,
            on_error="raise",
        )

        def backward(rows: torch.Tensor, batch: Batch) -> None:
            with recorder.batch(rows, batch):
                loss = token_loss(tuned.model, batch)
                recorder.see(loss)
                loss.backward()

        recorder.start()
        started = time.process_time()
        tuned.run(backward)
        seconds = time.process_time() - started
        recorder.stop()
        return recorder, seconds

    return run, lambda mu: lds(mu, known())
