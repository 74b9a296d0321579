"""Accidents inside the recording never reach the training: the recording stops, and the report says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from ine_callback.errors import CaptureError, UntoldRows
from ine_callback.utilities.options import OnError


class Guard:
    """Base of what runs inside of a training.

    Args:
        owner: Class named in messages.
        on_error: ``"warn"`` stops the recording and lets training go on; ``"raise"`` is for tests.

    Attributes:
        notes: Sentences for the report.
        steps: Optimizer steps recorded.
        recording: Whether records are taken.
        failed: Whether an accident ended that.
        reason: What it was.
        taken: Optimizer steps of the training, recorded or not.
    """

    def __init__(self, owner: str, on_error: OnError) -> None:
        self.owner, self.on_error = owner, on_error
        self.notes: list[str] = []
        self.steps, self.taken, self.recording, self.failed = 0, 0, False, False
        self.reason = ""

    def guarded(self, function: Callable[..., None], *args: object) -> None:
        """Calls a part of the recording, unless it has stopped."""
        if not self.recording:
            return
        try:
            function(*args)
        except (CaptureError, UntoldRows) as error:
            if self.steps or not error.always:  # a batch that went missing later must not end the training
                return self.fail(error)
            self.stop()  # before the first step: uncaptured="raise" or "fallback" asked for it, or rows never are told
            raise
        except Exception as error:  # the training run is sacred
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Stops the recording because of an accident."""
        first = not self.failed
        self.give_up()
        if first:
            self.reason = f"{type(error).__name__}: {error}"
        if self.on_error == "raise":
            raise error
        if not first:  # what comes after an accident is its consequence
            return
        message = f"recording stopped after {self.steps} steps: {self.reason}"
        self.notes.append(message)
        warnings.warn(f"{self.owner}: {message} Training goes on; the report holds what came before.", stacklevel=2)

    def give_up(self) -> None:
        """Takes no more records."""
        self.recording, self.failed = False, True

    def stop(self) -> None:
        """Removes every hook."""
        self.recording = False

    def note(self, note: str) -> None:
        """Adds a sentence to the report, once."""
        if note not in self.notes:
            self.notes.append(note)

    def warn(self, note: str) -> None:
        """Tells the user now, and in the report."""
        self.note(note)
        warnings.warn(f"{self.owner}: {note}.", stacklevel=3)
