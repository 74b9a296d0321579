"""Batches that use parameters otherwise than the check before the first step has seen: left out, checked, followed.

A T5 without padding in a batch has one operation fewer; a mask (torch.nn.utils.prune) computes a weight that was the
layer's own. That is seen in the graph of the loss, when nothing of the batch is recorded yet. So the batch is left out,
the check is made with it before the next one, and from then on these uses are known. What the check does not settle is
left out by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ine_callback.capture.bare.parameters import UNCHECKED
from ine_callback.capture.errors import FATAL, in_words
from ine_callback.capture.first_batch import find_new_uses
from ine_callback.capture.unfamiliar import RENAMED
from ine_callback.errors import UnknownRows
from ine_callback.recording.coverage import VERIFY
from ine_callback.recording.setup import Parts
from ine_callback.recording.steps import OptimizerSteps

_NEW = "it uses parameters by operations that no batch before had; they are checked, and recorded from the next one on"


class UnfamiliarUses:
    """Leaves out a batch with such uses, and has them checked.

    Args:
        parts: What the recording works with.
        steps: Counts what is left out.

    Attributes:
        changed: Whether directions are to be made anew, for the model is another one since the last.
    """

    def __init__(self, parts: Parts, steps: OptimizerSteps) -> None:
        self._parts, self._steps = parts, steps
        self._batch: tuple[int, Any] | None = None
        self._renamed: set[nn.Parameter] = set()
        self.changed = False
        alone = parts.processes.count == 1 and not steps.several  # else all would have to agree on the check
        parts.capture.unfamiliar.follows = alone and parts.training.loss is not None

    def leave_out(self, rows: int, data: Any, checkable: bool) -> bool:
        """Leaves out the batch, if there are any; where nothing can be checked drops them, and returns False."""
        capture, coverage, signals = self._parts.capture, self._parts.coverage, self._parts.signals
        if not capture.unfamiliar:
            return False
        if not checkable or data is None or capture.views > 1 or capture.entries is not None:
            uses, layers = capture.unfamiliar.take()
            for module in layers:
                capture.drop(module, RENAMED)
            for parameter, operation in uses.items():
                self._drop(parameter, operation)
            return False
        self._batch, capture.active = (rows, data), False
        for module in capture.unfamiliar.layers:
            capture.follow(module)
            signals.follow(module)
            for parameter in capture.bare.follow(module, self._parts.training.module):
                self._renamed.add(parameter)
                capture.unfamiliar.uses.setdefault(parameter, "the layer's own operation")
        signals.discard_received()
        coverage.wanted |= VERIFY
        self._steps.leave_out(UnknownRows(_NEW))
        return True

    def check(self) -> None:
        """Before the next batch: makes the check with the one that was left out."""
        if self._batch is None:
            return
        (rows, data), self._batch, self.changed = self._batch, None, True
        capture, training = self._parts.capture, self._parts.training
        uses, _ = capture.unfamiliar.take()
        if rows < 2:  # nothing can be found out: what was never known has to wait, the rest comes in other batches
            capture.unfamiliar.uses = {p: why for p, why in uses.items() if p not in capture.bare.layouts}
            return
        known, failure = self._known(uses), ""
        try:
            with capture.paused():
                assert training.loss is not None
                find_new_uses(training.module, capture, training.loss, data, rows, uses)
        except FATAL:
            raise
        except Exception as error:  # of the user's code
            failure = f" ({in_words(error)})"
        for parameter, new in self._known(uses).items():
            capture.unfamiliar.count(parameter)
            if not new - known[parameter] or parameter not in capture.bare.layouts:
                operation = capture.bare.unknown.get(parameter) or uses[parameter]
                self._drop(parameter, operation + failure)

    def _known(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, set[Any]]:
        """The kinds of operations that are known of each parameter: its uses, and those of no row."""
        bare = self._parts.capture.bare
        return {p: {*bare.layouts.get(p, ()), *bare.of_no_row.get(p, ())} for p in parameters}

    def _drop(self, parameter: nn.Parameter, operation: str) -> None:
        renamed = f"{RENAMED}; " if parameter in self._renamed else ""
        self._parts.capture.bare.drop(parameter, renamed + UNCHECKED.format(operation))
