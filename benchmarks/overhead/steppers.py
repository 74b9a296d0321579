"""One training step with and without a recording, and as other libraries take each row's gradients."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead.workloads import Workload, loss_of
from ine_callback import Recorder
from ine_callback.curvature.intervals import curvature_interval, refresh_interval
from ine_callback.curvature.low_rank import RANK
from ine_callback.report import InfluenceReport

ORDINARY, LOOK, REFRESH = "ordinary", "look", "refresh"
BASIS = "new basis"  # a refresh where a gradient store's rows are moved into another basis
KINDS = (ORDINARY, LOOK, REFRESH, BASIS)
DEFAULT, EXACT = "one query and self", "the same, exact"
MANY = 8  # queries of "ours, 8 queries"
AHEAD = 10_000  # steps that the recordings take for planned


def planned_kinds() -> Iterator[str]:
    """What the planned cadence makes of each step of a run."""
    refresh = look = 0
    for step in itertools.count():
        yield REFRESH if step == refresh else LOOK if step == look else ORDINARY
        if step == refresh:
            refresh += refresh_interval(step, None)
        if step == look:
            look += curvature_interval(step, None)


class Plain:
    """A network of its own, trained on the same rows in the same order as every other stepper's."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        torch.manual_seed(1)
        self.workload, self.device = workload, device
        self.model: nn.Module = workload.network().to(device)
        if device.type == "cuda":  # the fastest layout of convolutions there
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if workload.compiled:
            self.model = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=workload.lr, fused=device.type == "cuda")

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 on a GPU."""
        if self.device.type != "cuda" and not self.workload.half:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with self.precision():
            return loss_of(self.model, batch)

    def step(self, rows: Tensor, batch: tuple[Tensor, Tensor]) -> str:
        """Takes a step; returns what kind of step it was."""
        self.loss(batch).backward()
        self._update()
        return ORDINARY

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Ends it."""


class Recorded(Plain):
    """With a recording by ``Recorder``."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        queries: Any,
        rank: int | None = RANK,
        ahead: int = AHEAD,
        **knobs: Any,
    ) -> None:
        super().__init__(workload, device)
        self.recorder = Recorder(
            *(self.model, self.optimizer, len(workload.x), queries, loss_of),
            total_steps=ahead,
            context=self.precision,
            to_device=lambda batch: tuple(part.to(device) for part in batch),
            rank=rank,
            on_error="raise",
            **knobs,
        )
        self.recorder.start()
        self._kinds = planned_kinds()

    def step(self, rows: Tensor, batch: tuple[Tensor, Tensor]) -> str:
        with self.recorder.batch(rows, batch):
            loss = self.loss(batch)
            self.recorder.see(loss)
            loss.backward()
        self._update()
        return next(self._kinds)

    def report(self) -> InfluenceReport:
        """What was recorded."""
        return self.recorder.report()

    def close(self) -> None:
        self.recorder.stop(closing=False)


class Opacus(Plain):
    """Opacus's per-row gradients, formed and thrown away."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        from opacus import GradSampleModule

        super().__init__(workload, device)
        self.model = GradSampleModule(self.model, loss_reduction="mean")

    def _update(self) -> None:
        super()._update()
        for p in self.trained:
            p.grad_sample = None  # type: ignore[attr-defined]


class OpacusNorms(Plain):
    """Opacus's norms of each row's gradient by ghost clipping: one number a row, without the gradients."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        super().__init__(workload, device)
        self.model = GradSampleModuleFastGradientClipping(self.model, loss_reduction="mean", max_grad_norm=1.0)

    def _update(self) -> None:
        self.model.get_norm_sample()  # type: ignore[operator]
        super()._update()
        for p in self.trained:
            p._norm_sample = None  # type: ignore[attr-defined]


class Loop(Plain):
    """A backward pass for every row."""

    def step(self, rows: Tensor, batch: tuple[Tensor, Tensor]) -> str:
        for k in range(len(rows)):
            torch.autograd.grad(self.loss((batch[0][k : k + 1], batch[1][k : k + 1])), self.trained)
        return super().step(rows, batch)


def steppers(workload: Workload, device: torch.device, peers: bool) -> dict[str, Callable[[], Plain]]:
    """All of them by name, not made yet."""
    query = workload.query
    many = {f"part {k}": (query[0][k::MANY], query[1][k::MANY]) for k in range(MANY)}
    both = {"val": query, "self": "self"}
    found: dict[str, Callable[[], Plain]] = {
        "plain": lambda: Plain(workload, device),
        "one query": lambda: Recorded(workload, device, {"val": query}),
        DEFAULT: lambda: Recorded(workload, device, both),
        EXACT: lambda: Recorded(workload, device, both, None),
        f"{MANY} queries and self": lambda: Recorded(workload, device, many | {"self": "self"}),
    }
    if peers and importlib.util.find_spec("opacus"):
        found["Opacus, gradient of each row"] = lambda: Opacus(workload, device)
        found["Opacus, norm of each row"] = lambda: OpacusNorms(workload, device)
    if peers:
        found["one backward pass a row"] = lambda: Loop(workload, device)
    return found


LAST = {"mlp": ["4"], "cnn": ["7", "9"], "transformer": ["blocks.3*", "norm", "out"]}  # the layers of a last block


def turned(workload: Workload, device: torch.device, steps: int) -> dict[str, Callable[[], Plain]]:
    """One query and self-influence at several settings of the knobs, in a training of so many steps."""
    both = {"val": workload.query, "self": "self"}

    def recorded(rank: int | None = RANK, **knobs: Any) -> Callable[[], Plain]:
        return lambda: Recorded(workload, device, both, rank, steps, **knobs)

    found: dict[str, Callable[[], Plain]] = {"plain": lambda: Plain(workload, device), EXACT: recorded(None)}
    found |= {f"rank={rank}": recorded(rank) for rank in (4, 8, 16, 32, RANK)}
    found |= {f"curvature_every={every}": recorded(curvature_every=every) for every in (1, 16)}
    found |= {f"refresh_every={every}": recorded(refresh_every=every) for every in (5, 80)}
    found["reservoir=0"] = recorded(reservoir=0)
    found["discount=False"] = recorded(discount=False)
    return found | {"layers: the last block": recorded(layers=LAST[workload.name])}


def trainable(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
