"""The phases of a recording and of a batch: what is under way, held in one place and read by everybody."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a recording is. :class:`~ine_callback.recording.guard.Guard` holds it."""

    IDLE = "not started: no hook is attached"
    PROBING = "started; the first batch, whose row order is checked, is still to come"
    HOLDING = "per-sample gradients are held back until a backward pass has verified them: directions are still missing"
    RECORDING = "per-sample gradients are contracted with the directions as they come"
    STOPPED = "over, or stopped by an exception"


BEFORE_DIRECTIONS = (Phase.PROBING, Phase.HOLDING)
TAKING = (*BEFORE_DIRECTIONS, Phase.RECORDING)  # the recording is under way


class BatchPhase(Enum):
    """Where a batch is in its backward passes. :class:`~ine_callback.recording.backward.BackwardPasses` holds it."""

    WAITING = "no backward pass has brought a per-sample gradient"
    RUNNING = "a backward pass has begun and is not known to be over"
    OVER = "a backward pass is over and its gradients are measured"
    SETTLED = "the signals of the passes so far wait for the optimizer's step"


RECEIVED = (BatchPhase.RUNNING, BatchPhase.OVER)  # signals are there that do not wait for the step yet
