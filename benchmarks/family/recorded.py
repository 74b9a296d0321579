"""One recorded run of a protocol: what the package's defaults make of it, and the parts of which mu is made."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, device, nn

from benchmarks.family.networks import build, make_optimizer
from benchmarks.family.protocols import Protocol
from benchmarks.family.tasks import QUERIES, Task, mean_loss
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses
from benchmarks.recorded import recorded_step
from ine_callback import Query, Recorder
from ine_callback.methods import FINE
from ine_callback.methods.closing import Closing
from ine_callback.queries import SelfQuery
from ine_callback.scores import QueryInfo
from ine_callback.utilities.words import SIZE


@dataclass(frozen=True)
class Run:
    """One run's findings; the last of the Q = 51 queries is the mean loss of the others.

    Attributes:
        mu: Scores [N, Q].
        se: Their standard errors [N, Q].
        raw: Predicted shifts [N, Q] in units of the loss.
        own: Self-influence [N].
        predicted: Predicted fall of each query over the run [Q]; with the discount it is no prediction of a fall.
        fall: Its real fall over the run [Q].
        seconds: CPU seconds of the training with the recorder.
        marked: Whether the report says that sizes are not to be believed.
    """

    mu: Floats
    se: Floats
    raw: Floats
    own: Floats
    predicted: Floats
    fall: Floats
    seconds: float
    marked: bool = False

    @property
    def unit(self) -> Floats:
        """What mu takes for a query's standard deviation over trainings [Q]: size of raw shifts over that of mu."""
        found: Floats = np.sqrt((self.raw**2).sum(0) / (self.mu**2).sum(0))
        return found


class Measured(FINE):
    """f-INE that also keeps the shifts without their units, and the sum of all predicted changes."""

    closed: Closing | None = None

    def start(
        self,
        rows: int,
        queries: tuple[QueryInfo, ...],
        device: device,
        random_weights: bool = False,
        contrasts: int = 0,
    ) -> None:
        super().start(rows, queries, device, random_weights, contrasts)
        self.raw, self.total = torch.zeros(rows, len(queries)), torch.zeros(len(queries))

    def close(self, closing: Closing) -> None:
        super().close(closing)
        self.closed = closing

    @torch.no_grad()
    def update(
        self, rows: Tensor, signals: Tensor, rate: float, unit: Tensor | None = None, *more: Tensor | None
    ) -> None:
        super().update(rows, signals, rate, unit, *more)
        predicted = signals.float() * rate
        self.total += predicted.sum(0)
        others = (predicted.sum(0) - predicted) / (len(rows) - 1)
        self.raw.index_add_(0, rows, predicted - others)


def record(protocol: Protocol, task: Task, seed: int, discount: bool = True, closing: bool = True) -> Run:
    """Trains once with a recorder; everything but ``discount`` and ``closing`` is the package's default."""
    model, g = build(protocol, seed), torch.Generator().manual_seed(seed)
    optimizer, scheduler = make_optimizer(protocol, model.parameters(), protocol.steps)
    queries: dict[str, Query] = {
        "row": RowLosses(task.xq, task.yq, mean_loss),
        "mean": Query.loss((task.xq, task.yq)),
        "self": SelfQuery(),
    }
    method, before = Measured(closing=closing), query_losses(model, task)
    started = time.process_time()
    with Recorder(
        *(model, optimizer, protocol.rows, queries, mean_loss),
        methods=[method],
        total_steps=protocol.steps,
        schedulers=[] if scheduler is None else [(scheduler, 1)],
        discount=discount,
        on_error="raise",
    ) as recorder:
        for _ in range(protocol.epochs):
            for rows in torch.randperm(protocol.rows, generator=g).split(protocol.batch):
                batch = (task.x[rows], task.y[rows])
                recorded_step(recorder, model, optimizer, mean_loss, rows, batch, scheduler)
    report = recorder.report()
    scores, marked = report.scores, any(note.startswith(SIZE) for note in report.run.notes)
    seconds = time.process_time() - started
    raw, predicted = (a[..., : QUERIES + 1].double().numpy() for a in (method.raw, method.total))
    raw = raw if method.closed is None else method.closed.shift
    fall = before - query_losses(model, task)
    return Run(scores.mu[:, :-1], scores.se[:, :-1], raw, scores.mu[:, -1], predicted, fall, seconds, marked)


def query_losses(model: nn.Module, task: Task) -> Floats:
    """The queries' losses, and their mean [51]."""
    with torch.no_grad():
        each = [float(mean_loss(model, (task.xq[k : k + 1], task.yq[k : k + 1]))) for k in range(len(task.yq))]
    return np.array([*each, np.mean(each)])
