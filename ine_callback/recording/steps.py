"""The optimizers' steps: what became of the gradients since the backward passes, and the rows' accumulators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ine_callback.capture import Block
from ine_callback.errors import InfluenceError, UnknownRows
from ine_callback.optimizers.joint import JointOptimizer
from ine_callback.optimizers.registry import step_rate
from ine_callback.recording.guard import Guard
from ine_callback.recording.lanes import Lane, parted
from ine_callback.recording.observations import Observations, Pass, Taken
from ine_callback.recording.provenance import SINGLE_ROW
from ine_callback.recording.setup import Parts, records_signals
from ine_callback.recording.updates import Updates

ELSEWHERE = "its rows were unknown in another process"
MOST_GAPS = 1 << 10  # batches left out that one exchange can tell of


class OptimizerSteps:
    """Collects the passes of each optimizer's step, and updates the accumulators when steps were taken.

    A single optimizer's step is an update. The steps that several take between two batches are one update together.

    Args:
        guard: Holds the recording's steps and notes.
        parts: What the recording works with.
        updates: Counts the steps to the next refresh and curvature update.
        follow: Called after each update, with the parts and the most rows that one had.

    Attributes:
        updates: The same.
        several: Whether there are several optimizers.
        has_gap: Whether a batch of the present step is left out.
        left_out: Why batches were left out -> how many, of all processes.
    """

    def __init__(self, guard: Guard, parts: Parts, updates: Updates, follow: Callable[[Parts, int], None]) -> None:
        self._guard, self._parts, self.updates, self._follow = guard, parts, updates, follow
        self.several = len(parts.lanes) > 1
        self._taken, self._passes = Taken(), 0
        self._lr = 0.0
        self.has_gap = False
        self.left_out: Counter[str] = Counter()
        self._passes_by = False  # whether the gradients of a batch that is left out are still to come
        self._untold = 0  # batches left out here since the other processes were told

    def leave_out(self, error: UnknownRows) -> None:
        """Goes on without a batch whose rows are unknown, unless none ever will be known or others wait for it."""
        guard, parts = self._guard, self._parts
        waited_for = parts.processes.count > 1 and (self.several or parts.sharded)
        if waited_for or (error.always and not guard.steps and not self.left_out):
            raise error
        self._begin_gap()
        self._untold += 1
        message = str(error).removeprefix(f"{guard.owner}: ").rstrip(".")
        if message not in self.left_out:
            guard.warn(f"a batch is left out: {message}")
            guard.notes.remove(f"a batch is left out: {message}")  # the report says how many there were
        self.left_out[message] += 1

    def leave_out_together(self, elsewhere: int, here: bool) -> None:
        """All processes go on without a batch, whose rows are unknown here or in so many others, as all know now."""
        self._begin_gap()
        self._untold -= here
        if elsewhere:
            self.left_out[ELSEWHERE] += elsewhere

    def _begin_gap(self) -> None:
        """The gradients of a batch that is left out will be added to those of pending passes."""
        for lane in self._parts.lanes:
            self.measure_changes(lane)
        self.has_gap = self._passes_by = True

    def pass_by(self) -> None:
        """The gradients of the batch that is left out are there: what is done to them from now on is a change."""
        if self._passes_by:
            self._passes_by = False
            for lane in self._parts.lanes:
                if lane.pending:
                    lane.clipping.mark()

    def note_left_out(self) -> None:
        """Tells the report how many batches were left out."""
        for reason, count in self.left_out.items():
            self._guard.note(f"{count} batch{'es' if count > 1 else ''} left out: {reason}")

    # -- passes wait --------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether passes wait for a step."""
        return any(lane.pending for lane in self._parts.lanes)

    @property
    def begins(self) -> bool:
        """Whether the coming batch is an update's first. What others left pending before may wait, or be removed."""
        return not self.pending or (self.several and not self._passes)

    @property
    def apart(self) -> bool:
        """Whether the blocks' signals are told apart."""
        return self.several or self._parts.lanes[0].clipping.watching

    @property
    def marked(self) -> bool:
        """Whether gradients of a backward pass are known to wait for a step."""
        return any(lane.clipping.marked for lane in self._parts.lanes)

    def mark(self) -> None:
        """Called when a backward pass is over."""
        for lane in self._parts.lanes:
            lane.clipping.mark()

    def add(self, one: Pass) -> None:
        """Takes what a backward pass found."""
        self._passes += 1
        for lane, part in parted(one, self._parts.lanes, self._parts.training.optimizer):
            lane.pending.add(part)

    def discard(self) -> None:
        """Forgets the passes so far: their step was skipped, or their gradients were removed."""
        for lane in self._parts.lanes:
            self._discard(lane)

    def _discard(self, lane: Lane) -> None:
        blocks = lane.discard()
        self.has_gap = False
        if self.several and not lane.stepped:  # their directions may be made of gradients that no step took
            self._parts.signals.unmake(blocks)

    def unused(self, number: int) -> set[Block]:
        """Blocks whose optimizer did not take their gradients of the batch's pass of this number the last time."""
        optimizer = self._parts.training.optimizer
        if not isinstance(optimizer, JointOptimizer):
            return set()
        passed_by = {k for k, lane in enumerate(self._parts.lanes) if number in lane.unused}
        return {block for block in self._parts.signals.table if optimizer.place(block.parameters[0]) in passed_by}

    def measure_touched(self, among: set[nn.Parameter]) -> None:
        """Before a further pass: takes into account what was done to gradients of these parameters."""
        for lane in self._parts.lanes:
            if lane.clipping.touched(among):
                self.measure_changes(lane)

    def measure_changes(self, lane: Lane, last: bool = False) -> None:
        """Takes into account what was done to the gradients since the backward pass, or since the last call.

        Args:
            lane: Whose gradients.
            last: Whether the optimizer uses them now; else a further pass adds to them.
        """
        clipping = lane.clipping
        if not lane.pending or not clipping.marked:
            return
        if clipping.gone():
            return self._discard(lane)
        if not clipping.watching:
            if clipping.touched():
                clipping.watching = True
                self._discard(lane)
                self._guard.note(
                    f"step {self._guard.steps} is left out: gradients were changed between backward pass and step by "
                    "code that was not expected; they are measured from then on"
                )
            return
        if not lane.change(self._parts.capture.unscale, last):
            self._discard(lane)

    # -- a step is taken ----------------------------------------------------------------------------------------------

    def end(self, lane: Lane) -> None:
        """An optimizer has taken its step."""
        optimizer = self._parts.training.optimizer
        self.has_gap = False
        self._lr = float(optimizer.param_groups[0]["lr"])
        self._average_changes(lane)
        passes = lane.take()
        if isinstance(optimizer, JointOptimizer):
            optimizer.count(lane.optimizer, [id(one.losses) for one in passes])
        self._taken.add(step_rate(lane.optimizer), passes)
        if not self.several:
            self.update()

    def update(self) -> None:
        """Updates the accumulators with what steps have taken since the last update, if there were any."""
        if self._taken:
            self._update()
            self._follow(self._parts, self._guard.widest)

    def _update(self) -> None:
        guard, parts, optimizer = self._guard, self._parts, self._parts.training.optimizer
        self._passes = 0
        parts.schedule.advance(self._lr)
        if isinstance(optimizer, JointOptimizer):
            optimizer.end_update()
            for lane in parts.lanes:
                lane.pending.drop_counted()
        signals, rows = parts.signals, 0
        with torch.no_grad():
            width = 0 if signals.compression is None else signals.compression.size
            for observations, rate in self._taken.take(signals.nothing(parts.device), width):
                rows += self._observe(observations, rate)
        if not rows:
            return
        self._count_rows(rows)
        self.updates.end_step(guard.steps)
        guard.steps += 1
        if signals.curvature is not None:
            signals.curvature.end_step()

    def _observe(self, observations: Observations, rate: float) -> int:
        """Updates the accumulators with the observations of all processes; how many rows they have."""
        parts = self._parts
        processes, signals, coverage = parts.processes, parts.signals, parts.coverage
        # several numbers in one exchange
        packed = (parts.accumulators.check.count * MOST_GAPS + min(self._untold, MOST_GAPS - 1)) * 4 + coverage.requests
        sizes, received = zip(*processes.exchange(len(observations.rows), packed), strict=True)
        known = [one // 4 // MOST_GAPS for one in received]
        coverage.agree_on(one % 4 for one in received)
        self._untold = 0
        if elsewhere := sum(one // 4 % MOST_GAPS for k, one in enumerate(received) if k != processes.rank):
            self.left_out[ELSEWHERE] += elsewhere
        if any(sizes):
            observations = observations.joined(processes, sizes).times(1 / processes.count)
            units = signals.units(observations.self_variance)
            parts.accumulators.update(observations, rate, units, max(known))
            if parts.store is not None:
                parts.store.run(parts.store.vectors.update, observations, rate, max(known))
        return sum(sizes)

    def _average_changes(self, lane: Lane) -> None:
        """What was done to the whole gradients, where each process holds parts of them."""
        if not self._parts.sharded:
            return
        changes, processes = lane.pending.changes, self._parts.processes
        if len({count for count, _ in processes.exchange(len(changes))}) > 1:
            raise InfluenceError("the processes' gradients were changed at different times")
        with torch.no_grad():
            processes.average([change.moments for change in changes])

    def _count_rows(self, rows: int) -> None:
        """Warns of steps with a single row, which no signal can be compared in, once."""
        self._guard.widest = max(self._guard.widest, rows)
        if not self._guard.steps and rows == 1 and records_signals(self._parts.methods):
            self._guard.warn(SINGLE_ROW)


def watch_steps(
    lanes: Sequence[Lane], guard: Guard, ready: Callable[[Lane], None], taken: Callable[[Lane], None]
) -> list[Any]:
    """Hooks on each ``optimizer.step``; what they return are handles that remove them.

    Args:
        lanes: The optimizers'. A single one's step is an update of its own.
        guard: Runs both functions.
        ready: Called when the gradients are as the step uses them: after the closure, if there is one.
        taken: Called after the step.
    """
    return [handle for lane in lanes for handle in _watch(lane, guard, len(lanes) == 1, ready, taken)]


def _watch(
    lane: Lane, guard: Guard, alone: bool, ready: Callable[[Lane], None], taken: Callable[[Lane], None]
) -> list[Any]:

    def before(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not guard.recording or not callable(closure):
            guard.run(ready, lane)
            return None

        def watched() -> Any:
            loss = closure()
            guard.run(ready, lane)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def after(*_: Any) -> None:
        guard.moved = True
        if alone:
            guard.count_update()
        guard.run(taken, lane)

    return [lane.optimizer.register_step_pre_hook(before), lane.optimizer.register_step_post_hook(after)]
