"""The backward passes of a batch: per-sample gradients become signals, which wait for the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture import GradSample, Vector
from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.compiled_loss import CompiledLoss
from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.passes import Passes
from ine_callback.capture.row_losses import LossReading, Scale, read_loss
from ine_callback.capture.row_margins import read_margins
from ine_callback.capture.verification import Verification
from ine_callback.data.batches import lent
from ine_callback.data.row_entries import row_entries
from ine_callback.errors import RowsError, UnknownRows
from ine_callback.recording.coverage import HOLD, VERIFY
from ine_callback.recording.guard import Guard
from ine_callback.recording.observations import Pass, or_unknown
from ine_callback.recording.phases import BEFORE_DIRECTIONS, RECEIVED, BatchPhase, Phase
from ine_callback.recording.setup import Parts
from ine_callback.recording.steps import OptimizerSteps
from ine_callback.recording.unfamiliar import UnfamiliarUses
from ine_callback.recording.updates import Updates

Rows = Tensor | Sequence[int] | Callable[[Any], Any]  # or a function that finds them in the batch


class BackwardPasses:
    """Follows one batch at a time, from its rows to the signals of its backward passes.

    Args:
        guard: Holds the recording's phase.
        parts: What the recording works with.
        updates: When directions are refreshed and the curvature is updated.
        steps: Takes the signals of each pass.
    """

    def __init__(self, guard: Guard, parts: Parts, updates: Updates, steps: OptimizerSteps) -> None:
        self._guard, self._parts, self._updates, self._steps = guard, parts, updates, steps
        self._signals, self._coverage = parts.signals, parts.coverage
        self._capture = parts.capture
        self._batch: tuple[Tensor, Any] | None = None
        self._row_losses: Tensor | None = None
        self._row_margins: Tensor | None = None
        self._phase = BatchPhase.WAITING
        self._passes, self._lost = Passes(self._pass_over), 0
        self._compiled_loss = CompiledLoss(parts.training.module, self._told)
        self._unfamiliar = UnfamiliarUses(parts, steps)

    @property
    def _holding(self) -> bool:
        return self._guard.phase in BEFORE_DIRECTIONS

    @property
    def rows(self) -> Tensor | None:
        """The rows of the present batch."""
        return None if self._batch is None else self._batch[0]

    # -- a batch begins -----------------------------------------------------------------------------------------------

    def start_batch(self, rows: Rows, data: Any) -> None:
        """Announces the rows of the coming forward pass."""
        parts, step = self._parts, self._guard.steps
        self._unfamiliar.check()
        try:
            found = rows(data) if callable(rows) else rows
            given = row_entries(found)
            rows_of = rows if callable(rows) and given is not None else None
            rows = parts.accumulators.check.rows(found if given is None else given.rows, None if given else data)
            entries = None if given is None else EntryIndex(given, len(rows), parts.device, self._guard.owner)
            if self._steps.has_gap and self._holding:  # its gradients are not this step's alone
                raise UnknownRows("the first step's rows must all be known")
        except UnknownRows as error:
            self._steps.leave_out(error)
            self._agree(known=False)
            return
        if not self._agree(known=True):
            return
        if self._holding or self._coverage.slow:  # it is read again after the step, which may change it
            data = lent(data)
        rows = rows.to(parts.device, torch.int64, non_blocking=True)
        self._batch, self._row_losses, self._row_margins = (rows, data), None, None
        if self._phase is BatchPhase.SETTLED:
            self._phase = BatchPhase.WAITING
        due = False
        self._capture.entries, self._capture.rows_of = entries, rows_of
        if self._steps.begins:
            self.prepare_step(rows, data, rows_of)
            due = self._coverage.due(step)
            if self._coverage.wanted & HOLD:
                self._guard.enter(Phase.HOLDING)
            self._coverage.wanted = 0
        self._signals.curvature_steps = self._updates.curvature_steps(step)
        self._capture.start_batch(len(rows), entries)
        self._compiled_loss.rows, self._compiled_loss.views = len(rows), self._capture.views
        self._lost = self._passes.discarded
        self._passes.start_batch()
        if self._holding or due:
            self._begin_verification()
        window = len(rows) * parts.training.accumulate
        self._signals.start_batch(len(rows), parts.device, window)
        self._signals.scale = Scale(float(window), float(window))

    def _agree(self, known: bool) -> bool:
        """Whether all processes know their batch's rows, where more exchanges come in the batch: else none records it.

        In other batches only the process that does not know its own leaves them out; the step's end tells the others.
        """
        processes = self._parts.processes
        if processes.count == 1 or not self._exchanges:
            return known
        unknown = sum(not there for there, _ in processes.exchange(int(known)))
        if unknown:
            self._steps.leave_out_together(unknown - (not known), here=not known)
        return not unknown

    @property
    def _exchanges(self) -> bool:
        """Whether processes exchange something in the coming batch, before the optimizer's step."""
        steps, coverage = self._steps, self._coverage
        if steps.several or self._parts.sharded:  # in which no process goes on without a batch
            return False
        special = coverage.wanted or self._updates.refresh_due(self._guard.steps) or coverage.thawed()
        return self._holding or bool(steps.begins and special)

    def prepare_step(self, rows: Tensor, data: Any, rows_of: Callable[[Any], Any] | None = None) -> None:
        """Before a step's first batch: checks the row order, holds back where parameters are new, or refreshes."""
        guard, coverage, processes = self._guard, self._coverage, self._parts.processes
        if guard.phase is Phase.PROBING:
            guard.enter(Phase.HOLDING)
            checked = coverage.check_first_batch(self._parts.training.loss, data, len(rows), processes, rows_of)
            self._capture.one_each = self._steps.several and not checked
            if rows_of is None:
                self._compiled_loss.look(self._parts.training.loss, data, len(rows), self._capture.views)
        elif guard.phase is Phase.RECORDING and coverage.thawed():
            guard.enter(Phase.HOLDING)
            self._updates.next_curvature_update = guard.steps  # what joined has no curvature yet
        elif guard.phase is Phase.HOLDING:
            return
        elif self._updates.refresh_due(guard.steps) or self._unfamiliar.changed:
            self._unfamiliar.changed = False
            if not any(True for _ in self._signals.table):  # all layers were renamed: they are held back when they come
                return
            coverage.agree(processes)
            self._signals.refresh()
            self._updates.refreshed_at = guard.steps
            coverage.refreshed()
        elif self._updates.curvature_due(guard.steps):
            self._signals.draw()

    def see(self, loss: Tensor) -> None:
        """Reads each row's loss and margin and the loss's scale off the loss about to be differentiated."""
        if self._batch is None:
            return
        self._find_uses(loss)
        if self._leave_out_unfamiliar() or self._compiled_loss.inside:  # it tells in the backward pass
            return
        with torch.no_grad():
            views = max(self._capture.views, self._capture.loss_views)
            self._take(read_loss(loss, len(self._batch[0]), views, self._capture.entries))
            if self._row_losses is not None and self._capture.entries is None:
                self._row_margins = read_margins(loss, len(self._batch[0]))

    def _leave_out_unfamiliar(self, seen: bool = True) -> bool:
        """Leaves the batch out if it uses parameters otherwise than is known, and that can be checked.

        Args:
            seen: Whether its loss was seen, so that its backward pass is still to come.
        """
        if self._batch is None or not self._capture.unfamiliar:
            return False
        rows, data = self._batch
        # the first batch was checked just now; where an earlier pass waits for the step, it is too late to leave it out
        checkable = self._guard.phase is Phase.RECORDING and self._phase is not BatchPhase.SETTLED
        checkable &= seen or not self._steps.pending  # else gradients of passes before can no longer be told apart
        if not self._unfamiliar.leave_out(len(rows), data, checkable):
            return False
        self.end_verification()
        self._batch, self._phase = None, BatchPhase.WAITING
        return True

    def _take(self, reading: LossReading | None) -> None:
        if reading is None:
            self._guard.note("the training loss is of no standard form: taken as a mean over rows, row losses unknown")
            return
        self._row_losses = reading.rows
        scale = 1.0 if self._capture.unscale is None else self._capture.unscale
        self._signals.scale = Scale(reading.terms / scale, reading.scale / scale)

    def _told(self, reading: LossReading | None, margins: Tensor | None) -> None:
        """Takes what a compiled backward pass says of the loss, before it comes to the first layer."""
        if self._batch is not None and self._capture.active:
            with torch.no_grad():
                self._take(reading)
            self._row_margins = margins

    def _find_uses(self, loss: Tensor) -> None:
        """Finds parameters outside of layers, and where a pass is to be verified, what belongs to no row."""
        elsewhere = self._capture.see(loss, self._signals.verification)
        alone = self._parts.processes.count == 1 and self._signals.verification is None and not self._holding
        if alone and self._phase not in RECEIVED and self._coverage.changed(self._passes.count):
            self._begin_verification()
            elsewhere |= self._capture.see(loss, self._signals.verification)
        for parameter in elsewhere:
            self._signals.table.tie(parameter)

    # -- a backward pass ----------------------------------------------------------------------------------------------

    def receive(self, module: nn.Module, grad_samples: dict[str, GradSample]) -> None:
        """Takes the per-sample gradients of one call of a layer, in the backward pass."""
        trainable = self._signals.table.trainable(module)
        self._passes.touch((known for _, known in trainable), self._begin_pass)
        self._phase = BatchPhase.RUNNING
        # FSDP2 replaces parameters for the pass; another optimizer's turn may have frozen them when the batch began
        if self._signals.verification is not None and (self._parts.sharded or self._steps.several):
            for p, known in trainable:
                self._signals.verification.watch(p, known)
        calls, layer = self._capture.uses(module, grad_samples), module in self._capture.names
        layer |= not all(isinstance(each, Vector) for each in grad_samples.values())
        self._signals.borrowed = self._capture.borrowed
        if self._capture.double_backward:  # a gradient penalty's layers come before the network's last one
            layer = module is self._capture.last_called
        self._signals.receive(module, grad_samples, calls, self._holding, layer)

    def lose(self, lost: nn.Module | nn.Parameter) -> None:
        """A layer or bare parameter was dropped: the others go on, if there are any."""
        self._signals.lose(lost)
        left = any(True for _ in self._signals.table) or self._capture.bare.layouts  # whose blocks may be to come
        if self._guard.phase is Phase.RECORDING and not left:
            self._guard.fail(RowsError(f"no layer is left to record: {self._coverage.first_reason()}"))

    def _begin_pass(self) -> None:
        """The first gradient of a pass: forgets passes whose gradients are gone; verifies what was never verified."""
        received, passes, steps = self._phase in RECEIVED, self._passes, self._steps
        unsettled = received or (steps.pending and not steps.several)
        if unsettled and not self._parts.sharded and passes.gone():
            self._signals.discard_received()
            self._capture.forget()
            self._discard_gone()
            self._phase, passes.discarded = BatchPhase.WAITING, passes.count
        elif steps.marked and (
            (steps.several and not received) or not (self._holding or self._signals.verification is not None)
        ):
            self.settle(False)
            # other layers' parameters may have got this pass's gradients already
            steps.measure_touched(self._hooked_parameters())
        received, self._phase = self._phase in RECEIVED, BatchPhase.RUNNING
        self._signals.aside = passes.count < self._lost
        self._signals.unused = steps.unused(passes.count)
        if self._holding:  # what is held back is verified
            if self._signals.verification is None:
                self._begin_verification()
            return
        if self._coverage.changed(passes.count):
            self._verify_change(received)

    def _discard_gone(self) -> None:
        """After the gradients of the last pass were removed: of several optimizers, others may keep theirs."""
        if self._steps.several:
            self._steps.measure_touched(self._hooked_parameters())
        else:
            self._steps.discard()

    def _hooked_parameters(self) -> set[nn.Parameter]:
        return {p for module in self._capture.names for p in own_parameters(module).values()}

    def _verify_change(self, received: bool) -> None:
        """A pass of a kind that was never verified: verifies it at once, or asks for that in the next step."""
        coverage, verifying = self._coverage, self._signals.verification is not None
        if self._parts.processes.count > 1 or received:  # all processes verify, and hold back, in the same step
            if coverage.joining:
                coverage.requests |= VERIFY | HOLD
            elif not verifying:
                coverage.requests |= VERIFY
            return
        if not verifying:
            self._begin_verification()
        if coverage.joining and not self._steps.several:  # else each block is held back until it has a direction
            self._guard.enter(Phase.HOLDING)

    def _pass_over(self) -> None:
        """Told by autograd; under DDP gradients are still to be averaged then."""
        if not self._parts.training.distributed:
            self._guard.run(self._end_pass)

    def _end_pass(self) -> None:
        """Measures the gradients, before anybody else sees them."""
        if self._phase is BatchPhase.RUNNING:
            self._phase = BatchPhase.OVER
        if self._signals.verification is not None and not self._parts.training.distributed:
            self._signals.verification.end_pass()
        with torch.no_grad():
            self._steps.mark()

    def settle(self, backward: bool) -> None:
        """Moves the signals of the backward passes so far to those that wait for the optimizer's step.

        Args:
            backward: Whether there was a pass, also where no hook was called in it.
        """
        if self._batch is None:
            return self._steps.pass_by()
        if not (self._phase in RECEIVED or backward) or self._leave_out_unfamiliar(seen=False):
            return
        if self._phase is not BatchPhase.OVER:
            self._end_pass()
        rows, data = self._batch
        with self._capture.paused():
            self._coverage.watch_changes(self._signals, self._guard.steps)
            if self._holding:
                self._make_first_directions(rows, data)
            elif self._signals.verification is not None:
                self._verify(rows, data)
            else:
                self._fall_back(rows, data)
            if self._signals.held and not self._holding:  # blocks that no direction was made for yet
                self._parts.processes.exchange()
                self._release()
        with torch.no_grad():
            compression = self._signals.compression
            compressed = None
            if compression is not None:
                compressed = compression.run(compression.settle, len(rows)) or compression.nothing(len(rows))
            blocks, signals, self_variance = self._signals.settle(self._steps.apart)
            losses, margins = (or_unknown(read, self_variance[0]) for read in (self._row_losses, self._row_margins))
            number = max(0, self._passes.count - 1)
            self._steps.add(Pass(rows, blocks, signals, self_variance, losses, margins, compressed, number))
        self._phase = BatchPhase.SETTLED

    # -- verification -------------------------------------------------------------------------------------------------

    def _begin_verification(self) -> None:
        """Has the coming gradients compared with the sums of the per-sample gradients."""
        self._signals.verification = self._coverage.begin(self._guard.fail)

    def _verify(self, rows: Tensor, data: Any) -> bool:
        """Drops what the verification finds wrong, also by per-row autograd; False where gradients overflowed."""
        verification, self._signals.verification = self._signals.verification, None
        assert verification is not None
        verification.close()
        self._coverage.check_terms(self._parts.training.loss, data, len(rows), verification)
        finite = self._coverage.verify(
            verification, self._signals, self._parts.processes, self._guard.steps, self._passes.count
        )
        if finite:
            self._fall_back(rows, data, verification)
            others = self._steps.several and self._capture.names  # whose turn comes later
            if not others and not any(True for _ in self._signals.table):
                raise RowsError(f"{self._guard.owner}: {self._coverage.nothing_left(len(rows))}")
        return finite

    def _make_first_directions(self, rows: Tensor, data: Any) -> None:
        """Ends holding back: verifies the capture, makes directions, and contracts what was held back with them."""
        self._parts.processes.exchange()
        # after an overflow the step is skipped; nor can directions be made of one player's layers that were all dropped
        if not self._verify(rows, data) or not any(True for _ in self._signals.table):
            self._signals.held.clear()
            return
        self._guard.enter(Phase.RECORDING)
        self._release()

    def _release(self) -> None:
        """Makes directions, and contracts what was held back with them."""
        self._signals.release(1.0 if self._capture.unscale is None else self._capture.unscale)
        self._updates.refreshed_at = self._guard.steps

    def _fall_back(self, rows: Tensor, data: Any, verification: Verification | None = None) -> None:
        """Takes the gradients of parameters without a capture by one backward pass a row."""
        loss = self._parts.training.loss
        for block, grad_sample in self._coverage.fallback(loss, data, len(rows), self._signals, verification):
            self._signals.take(block, grad_sample, self._holding)

    # -- a batch ends -------------------------------------------------------------------------------------------------

    def end_batch(self) -> None:
        """Ends the batch; its signals wait for the optimizer's step."""
        # nothing received: no backward pass at all, or one that no hook could read; only the latter leaves gradients
        unread = (self._holding or self._coverage.slow) and self._phase is BatchPhase.WAITING
        self.settle(unread and any(p.grad is not None for p in self._parts.training.module.parameters()))
        self._capture.end_batch()
        self._batch = None
        self.end_verification()

    def close(self) -> None:
        """Ends the recording."""
        self.end_verification()
        self._compiled_loss.detach()

    def end_verification(self) -> None:
        """Leaves a verification that no backward pass came to."""
        verification, self._signals.verification = self._signals.verification, None
        if verification is not None:
            verification.close()
