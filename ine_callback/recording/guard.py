"""What a recording shares about itself: its phase, its steps, its notes. An exception in it never reaches training."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from ine_callback.errors import CaptureError, UnknownRows
from ine_callback.recording.phases import TAKING, Phase
from ine_callback.utilities.options import OnError


class Guard:
    """Runs the parts of a recording; an exception stops the recording, never the training.

    Args:
        owner: Class named in messages.
        on_error: ``"warn"`` stops the recording and lets training go on; ``"raise"`` is for tests.
        leave: Called when the recording stops early, to let go of what others wait for.
        stop: Removes every hook.

    Attributes:
        phase: Where the recording is.
        notes: Sentences for the report.
        steps: Optimizer steps recorded.
        taken: Optimizer steps of the training, recorded or not; of several optimizers, their updates.
        moved: Whether there was a step since these were last counted.
        widest: Most rows in a step.
        failed: Whether an exception stopped the recording.
        reason: Which exception.
    """

    def __init__(self, owner: str, on_error: OnError, leave: Callable[[], None], stop: Callable[[], None]) -> None:
        self.owner, self._on_error, self._leave, self._stop = owner, on_error, leave, stop
        self.phase, self.failed, self.reason = Phase.IDLE, False, ""
        self.notes: list[str] = []
        self.steps = self.taken = self.widest = 0
        self.moved = False

    def count_update(self) -> None:
        """Counts the steps since the last call as one update of the weights."""
        self.taken, self.moved = self.taken + self.moved, False

    @property
    def recording(self) -> bool:
        """Whether the recording is under way."""
        return self.phase in TAKING

    def enter(self, phase: Phase) -> None:
        """Goes on to a phase; what has stopped stays stopped."""
        if self.phase is not Phase.STOPPED:
            self.phase = phase

    def run(self, function: Callable[..., None], *args: object) -> None:
        """Calls a part of the recording, unless it has stopped.

        Raises:
            CaptureError: Before the first step, where ``uncaptured="raise"`` or ``"fallback"`` asked for it.
            UnknownRows: Before the first step, where no batch will ever tell its rows.
        """
        if not self.recording:
            return
        try:
            function(*args)
        except (CaptureError, UnknownRows) as error:
            if self.steps or not error.always:  # a batch that goes missing later must not end the training
                return self.fail(error)
            self._stop()
            raise
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Stops the recording because of an exception."""
        first = not self.failed
        self.give_up()
        if first:
            self.reason = f"{type(error).__name__}: {error}"
        if self._on_error == "raise":
            raise error
        if not first:  # a consequence of the first one
            return
        message = f"recording stopped after {self.steps} steps: {self.reason}"
        self.notes.append(message)
        warnings.warn(f"{self.owner}: {message} Training goes on; the report holds what came before.", stacklevel=2)

    def give_up(self) -> None:
        """Records nothing more; hooks stay attached until the recorder stops."""
        self.phase, self.failed = Phase.STOPPED, True
        self._leave()

    def note(self, note: str) -> None:
        """Adds a sentence to the report, once."""
        if note not in self.notes:
            self.notes.append(note)

    def warn(self, note: str) -> None:
        """Tells the user now, and in the report."""
        self.note(note)
        warnings.warn(f"{self.owner}: {note}.", stacklevel=3)
