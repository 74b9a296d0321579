"""Coverage: which parameters the signals speak for. Settled in the first step, told in the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ine_callback.capture import Block, BlockTable, Capture, Record, Vector
from ine_callback.capture.fallback import row_shares
from ine_callback.capture.odd import wrong_functions
from ine_callback.capture.probe import row_order_faults
from ine_callback.capture.row_losses import Scale
from ine_callback.capture.verify import share_of, uncaptured, wrong_blocks
from ine_callback.data.batches import led_by
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import CaptureError, RowsError
from ine_callback.utilities.options import Uncaptured


class Coverage:
    """Proves the capture in the first step and names what it misses.

    Args:
        module: The model.
        capture: Its hooks.
        policy: What to do about uncaptured parameters.
        owner: Class named in messages.

    Attributes:
        share: Share of the trainable parameters whose rows' gradients are recorded.
        uncaptured: Parameter name -> why it is left out.
        approximate: Module name -> why its single rows are approximate.
    """

    def __init__(self, module: nn.Module, capture: Capture, policy: Uncaptured, owner: str) -> None:
        self._module, self._capture, self._policy, self._owner = module, capture, policy, owner
        self.share = 0.0
        self.uncaptured: dict[str, str] = {}
        self.approximate = dict(capture.approximate)
        self.notes: list[str] = []
        self._slow: dict[str, nn.Parameter] = {}
        self._probed = False
        self._dropped: set[str] = set()
        self._proved: set[nn.Parameter] = set()

    def probe(
        self, loss: Callable[[nn.Module, Any], Tensor] | None, batch: Any, rows: int, processes: Lockstep
    ) -> None:
        """Drops the layers whose inputs are not led by the batch's rows; later calls do nothing."""
        if self._probed:
            return
        self._probed = True
        fewest = min(there for there, _ in processes.meet(rows))  # all probe, or none
        if loss is None or batch is None or fewest < 2:
            self.notes.append("the order of rows inside the layers was not checked (no batch to rerun)")
            return
        try:
            faults = row_order_faults(self._module, self._capture, loss, batch, rows)
            faults = wrong_functions(self._module, self._capture, loss, batch, rows) | faults
        except Exception as error:
            self.notes.append(f"the order of rows inside the layers was not checked ({type(error).__name__}: {error})")
            return
        if not led_by(batch, rows):
            self.notes.append(
                f"the order of rows inside the layers was not checked (no part of a batch has its {rows} rows)"
            )
        for module, reason in faults.items():
            self._capture.drop(module, reason)

    def thawed(self) -> bool:
        """Whether parameters are trained that were frozen (or not yet there) when the capture was proved."""
        return any(p.requires_grad and p not in self._proved for p in self._module.parameters())

    def agree(self, processes: Lockstep) -> None:
        """Drops what another process dropped, so that all rows' scores speak for the same layers. A meeting."""
        if processes.count == 1:
            return
        if not self._capture.names:
            raise RowsError(f"{self._owner}: no layer is left to record: {self.first_reason()}")
        common = processes.common(self._capture.names.values())
        for module, name in list(self._capture.names.items()):
            if name not in common:
                self._capture.drop(module, "another process that trains the model had to leave it out")

    @property
    def slow(self) -> bool:
        """Whether some parameters are recorded by per-row autograd."""
        return bool(self._slow)

    def prove(self, held: list[Any], table: BlockTable, processes: Lockstep) -> list[Any]:
        """Compares the first backward pass's records with ``grad``; returns those that stay.

        Raises:
            CaptureError: If parameters are uncaptured under the policy ``"raise"``.
        """
        self.agree(processes)
        wrong = wrong_blocks([(block, record) for block, record, _ in held], self._capture.half, processes)
        for block in wrong:
            table.drop(block)
        missing = uncaptured(self._module, table.captured(), self._capture.dropped)
        names = {p: n for n, p in self._module.named_parameters()}
        for block, reason in wrong.items():
            missing.update({names[p]: reason for p in block.parameters})
        self._settle(self._without_deselected(missing))
        self._dropped = set(self._capture.dropped)
        self._proved.update(p for p in self._module.parameters() if p.requires_grad)
        return [item for item in held if item[0] not in wrong]

    def _without_deselected(self, missing: dict[str, str]) -> dict[str, str]:
        """What is missing although it was asked for; the share recorded counts all that is missing."""
        self.share = 1.0 - share_of(self._module, missing)
        rest = {n: why for n, why in missing.items() if n.rpartition(".")[0] not in self._capture.deselected}
        if len(rest) < len(missing):
            left = share_of(self._module, set(missing) - set(rest))
            self.notes.append(f"layers= leaves out {left:.1%} of the trainable parameters: scores speak for the others")
        return rest

    def _settle(self, missing: dict[str, str]) -> None:
        if not missing:
            return
        share = share_of(self._module, missing)
        listing = "; ".join(
            f"{name} ({share_of(self._module, [name]):.1%}): {why}" for name, why in list(missing.items())[:8]
        )
        message = f"{self._owner}: {share:.1%} of the trainable parameters are not captured: {listing}."
        if self._policy == "raise":
            raise CaptureError(f"{message} Register a layer function, or pass uncaptured='warn' or 'fallback'.")
        parameters = dict(self._module.named_parameters())
        if self._policy == "fallback":
            self._slow = {name: parameters[name] for name in missing}
            self.share += share
            self.notes.append(f"per-row autograd (one backward pass a row) for: {', '.join(missing)}")
            return
        self.uncaptured = {
            n: f"{why} ({share_of(self._module, [n]):.1%} of the parameters)" for n, why in missing.items()
        }
        warnings.warn(f"{message} Signals leave them out; uncaptured='fallback' records them slowly.", stacklevel=2)

    def fallback(
        self, loss: Callable[[nn.Module, Any], Tensor] | None, batch: Any, rows: int, scale: Scale, table: BlockTable
    ) -> list[tuple[Block, Record]]:
        """Records of the uncaptured parameters by one backward pass a row.

        Raises:
            CaptureError: If there is no loss or batch to differentiate again.
        """
        if not self._slow:
            return []
        if loss is None or batch is None:
            raise CaptureError(f"{self._owner}: uncaptured='fallback' needs loss= and the batch of every step.")
        parameters = list(self._slow.values())
        shares = row_shares(self._module, loss, batch, rows, parameters, scale)
        return [(table.vector(p), Vector(g.reshape(rows, -1))) for p, g in zip(parameters, shares, strict=True)]

    def late_notes(self) -> list[str]:
        """What was lost after the first step's proof."""
        dropped = self._capture.dropped
        return [
            f"{name} was left out from some step on: {why}"
            for name, why in dropped.items()
            if name not in self._dropped
        ]

    def first_reason(self) -> str:
        """One reason, for the message when nothing is left."""
        return next(iter(self._capture.dropped.values()), "no layer with a known type was called")
