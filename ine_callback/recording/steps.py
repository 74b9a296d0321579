"""The optimizer's step: what became of the gradients since the backward passes, and the rows' accumulators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ine_callback.errors import InfluenceError, UnknownRows
from ine_callback.optimizers.registry import step_rate
from ine_callback.recording.guard import Guard
from ine_callback.recording.observations import Pass, Pending
from ine_callback.recording.provenance import SINGLE_ROW
from ine_callback.recording.setup import Parts, records_signals
from ine_callback.recording.updates import Updates


class OptimizerSteps:
    """Collects the passes of a step, and updates the accumulators when the step is taken.

    Args:
        guard: Holds the recording's steps and notes.
        parts: What the recording works with.
        updates: Counts the steps to the next refresh and curvature update.

    Attributes:
        updates: The same.
        pending: The passes that wait for the step.
        has_gap: Whether a batch of the present step is left out.
        left_out: Why batches were left out -> how many.
    """

    def __init__(self, guard: Guard, parts: Parts, updates: Updates) -> None:
        self._guard, self._parts, self.updates = guard, parts, updates
        self.pending = Pending()
        self.has_gap = False
        self.left_out: Counter[str] = Counter()

    def leave_out(self, error: UnknownRows) -> None:
        """Goes on without a batch whose rows are unknown, unless none ever will be known or others wait for it."""
        guard = self._guard
        if self._parts.processes.count > 1 or (error.always and not guard.steps and not self.left_out):
            raise error
        self.has_gap = True
        message = str(error).removeprefix(f"{guard.owner}: ").rstrip(".")
        if message not in self.left_out:
            guard.warn(f"a batch is left out: {message}")
            guard.notes.remove(f"a batch is left out: {message}")  # the report says how many there were
        self.left_out[message] += 1

    def add(self, one: Pass) -> None:
        """Takes what a backward pass found."""
        self.pending.add(one)

    def discard(self) -> None:
        """Forgets the passes so far: their step was skipped, or their gradients were removed."""
        self.pending.clear()
        self._parts.clipping.forget()
        self.has_gap = False

    def measure_changes(self, last: bool = False) -> None:
        """Takes into account what was done to the gradients since the backward pass, or since the last call.

        Args:
            last: Whether the optimizer uses them now; else a further pass adds to them.
        """
        clipping = self._parts.clipping
        if not self.pending or not clipping.marked:
            return
        if clipping.gone():
            return self.discard()
        if not clipping.watching:
            if clipping.touched():
                clipping.watching = True
                self.discard()
                self._guard.note(
                    f"step {self._guard.steps} is left out: gradients were changed between backward pass and step by "
                    "code that was not expected; they are measured from then on"
                )
            return
        unscale, scale = self._parts.capture.unscale, getattr(self._parts.training.optimizer, "grad_scale", None)
        with torch.no_grad():
            before = 1.0 if unscale is None or not last else unscale
            change = clipping.change(before, 1.0 if scale is None or not last else 1.0 / scale)
        if change is not None and not last and change.zeroed():
            return self.discard()
        if change is not None:
            self.pending.change(change)

    def end(self) -> None:
        """The optimizer has taken the step: its observations update the accumulators, those of all processes."""
        guard, parts, optimizer = self._guard, self._parts, self._parts.training.optimizer
        processes, signals, coverage = parts.processes, parts.signals, parts.coverage
        self.has_gap = False
        parts.schedule.advance(float(optimizer.param_groups[0]["lr"]))
        parts.clipping.forget()
        with torch.no_grad():
            self._average_changes()
            observations = self.pending.take(signals.columns, signals.contrasts.count, parts.device)
            packed = 4 * parts.accumulators.check.count + coverage.requests  # two numbers in one exchange
            sizes, received = zip(*processes.exchange(len(observations.rows), packed), strict=True)
            known = [one // 4 for one in received]
            coverage.agree_on(one % 4 for one in received)
            if not any(sizes):
                return
            observations = observations.joined(processes, sizes).times(1 / processes.count)
            parts.accumulators.update(
                observations, step_rate(optimizer), signals.units(observations.self_variance), max(known)
            )
        self._count_rows(sum(sizes))
        self.updates.end_step(guard.steps)
        guard.steps += 1
        if signals.curvature is not None:
            signals.curvature.end_step()

    def _average_changes(self) -> None:
        """What was done to the whole gradients, where each process holds parts of them."""
        if not self._parts.sharded:
            return
        changes, processes = self.pending.changes, self._parts.processes
        if len({count for count, _ in processes.exchange(len(changes))}) > 1:
            raise InfluenceError("the processes' gradients were changed at different times")
        processes.average([change.moments for change in changes])

    def _count_rows(self, rows: int) -> None:
        """Warns of steps with a single row, which no signal can be compared in, once."""
        self._guard.widest = max(self._guard.widest, rows)
        if not self._guard.steps and rows == 1 and records_signals(self._parts.methods):
            self._guard.warn(SINGLE_ROW)


def watch_steps(optimizer: Optimizer, guard: Guard, ready: Callable[[], None], taken: Callable[[], None]) -> list[Any]:
    """Hooks on ``optimizer.step``; what they return are handles that remove them.

    Args:
        optimizer: The optimizer.
        guard: Runs both functions.
        ready: Called when the gradients are as the step uses them: after the closure, if there is one.
        taken: Called after the step.
    """

    def before(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not guard.recording or not callable(closure):
            guard.run(ready)
            return None

        def watched() -> Any:
            loss = closure()
            guard.run(ready)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def after(*_: Any) -> None:
        guard.taken += 1
        guard.run(taken)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
