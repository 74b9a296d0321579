"""Coverage: which parameters the signals speak for. Verified in the first step and again later, named in the report."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ine_callback.capture import Block, Capture, GradSample, Vector
from ine_callback.capture.bare.no_row import find_terms_of_no_row
from ine_callback.capture.entry_order import entry_faults
from ine_callback.capture.fallback import COMPARED, FallbackVerification, row_contributions, separable
from ine_callback.capture.first_batch import first_batch_faults
from ine_callback.capture.row_mixing import MIXED, as_in_training
from ine_callback.capture.row_order import VIEWS
from ine_callback.capture.verification import Verification, fraction_of, uncaptured
from ine_callback.data.batches import holds_graphs, is_all_led_by
from ine_callback.distributed.processes import Lockstep
from ine_callback.distributed.sharding import is_sharded
from ine_callback.errors import CaptureError, RowsError
from ine_callback.utilities.options import Uncaptured

if TYPE_CHECKING:
    from ine_callback.scoring.signals import Signals

# What a process asks of the next step, as bits: two numbers travel in one.
VERIFY = 1  # to verify the capture again
HOLD = 2  # to hold per-sample gradients back, so that layers that joined get directions

_OF_NO_ROW = (
    "the loss holds terms that belong to no row (a penalty on weights): they have no part in any row's score, "
    "nor in the discount"
)
_HOOKED = (
    "hooks on parameters (register_hook) may change gradients, which is seen in verified steps alone; change them in "
    "on_before_optimizer_step or configure_gradient_clipping, where it is measured"
)
OUTSIDE = "parameters that are not the module's"
_PER_ROW = "per-row autograd (one backward pass a row) for: "
_ELSEWHERE = "another process that trains the model had to leave it out"
_NOT_ALONE = (
    "; uncaptured='fallback' needs batches that can be cut into rows, and one with several rows in a sequence cannot "
    "be: give each row a sequence of its own, or register a layer function"
)
_SLOWLY = "; uncaptured='fallback' records them slowly"


class Coverage:
    """Verifies the capture and names what it misses.

    Args:
        module: The model.
        capture: Its hooks.
        policy: What to do about uncaptured parameters.
        owner: Class named in messages.

    Attributes:
        share: Fraction of the trainable parameters whose rows' gradients are recorded.
        uncaptured: Parameter name -> why it is left out.
        approximate: Module name -> why its single rows are approximate.
        requests: What this process asks of the next step: ``VERIFY``, ``HOLD`` or both; after a step all agree.
        wanted: What they agreed on.
    """

    def __init__(self, module: nn.Module, capture: Capture, policy: Uncaptured, owner: str) -> None:
        self._module, self._capture, self._policy, self._owner = module, capture, policy, owner
        self.share = 0.0
        self.uncaptured: dict[str, str] = {}
        self.approximate = dict(capture.approximate)
        self.notes: list[str] = []
        self.requests = self.wanted = 0
        self._missing: dict[str, str] = {}
        self._slow: dict[str, nn.Parameter] = {}
        self._summed = False  # whether the loss is a sum over rows, for the fallback, where its form is not known
        self._verified: set[nn.Parameter] = set()
        self._dormant: list[nn.Parameter] = []
        self._used: set[tuple[nn.Module | nn.Parameter | str, int]] = set()
        self._since, self._advisable = "", True  # words of when; whether to advise uncaptured="fallback"
        self._last: int | None = None  # the step that was verified last
        self._dropped: set[str] = set()
        self._alone = True  # whether a batch can be cut into single rows
        self._outside = 0  # elements of trained parameters that are not the module's
        self._refreshes = False  # whether the coming step refreshes the directions

    def check_first_batch(
        self,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        batch: Any,
        rows: int,
        processes: Lockstep,
        rows_of: Callable[[Any], Any] | None = None,
    ) -> bool:
        """Drops the layers that cannot be recorded row by row; once, before the first step. Whether it could check."""
        fewest = min(there for there, _ in processes.exchange(rows))  # all processes check, or none
        if loss is None or batch is None or fewest < 2:
            self.notes.append("the order of rows inside the layers was not checked (no batch to rerun)")
            return False
        if self._capture.entries is not None:
            self._alone = holds_graphs(batch) or is_all_led_by(batch, rows)
            faults, unchecked = entry_faults(self._module, self._capture, loss, batch, rows, rows_of)
            self.notes += unchecked
            for module, reason in faults.items():
                self._capture.drop(module, reason)
            return not unchecked
        views = self._policy != "fallback" and processes.count == 1
        faults, unchecked = first_batch_faults(
            self._module, self._capture, loss, batch, rows, training=True, views=views
        )
        if self._capture.views > 1:
            self.notes.append(f"the model sees {self._capture.views} views of each row: a row's score is that of all")
        self.notes += unchecked
        self.approximate.update(self._capture.approximate)
        if any(VIEWS in reason for reason in faults.values()):
            self._advisable = separable(self._module, loss, batch, rows)
        for module, reason in faults.items():
            self._capture.drop(module, reason)
        return not unchecked

    def name_outside(self, told: str, size: int) -> None:
        """Names trained parameters that are not the module's, of so many elements: no hook is on their layers."""
        self._outside, self.uncaptured[OUTSIDE] = size, told
        warnings.warn(f"{self._owner}: {told}. Signals leave them out.", stacklevel=2)

    def _measure_share(self) -> None:
        inside = sum(p.numel() for p in self._module.parameters() if p.requires_grad or p in self._verified)
        recorded = 1.0 - fraction_of(self._module, self._missing, self._verified)
        self.share = recorded * inside / max(1, inside + self._outside)

    def thawed(self) -> bool:
        """Whether parameters are trained that were frozen (or not yet there) when the capture was verified."""
        return any(p.requires_grad and p not in self._verified for p in self._module.parameters())

    def agree(self, processes: Lockstep) -> None:
        """Drops what another process dropped, so that all rows' scores speak for the same layers. An exchange."""
        if processes.count == 1:
            return
        bare = self._capture.bare
        if not self._capture.names and not bare.layouts:
            raise RowsError(f"{self._owner}: no layer is left to record: {self.first_reason()}")
        common = processes.common([*self._capture.names.values(), *bare.named()])
        for module, name in list(self._capture.names.items()):
            if name not in common:
                self._capture.drop(module, _ELSEWHERE)
        for name, parameter in bare.named().items():
            if name not in common:
                bare.drop(parameter, _ELSEWHERE)

    @property
    def slow(self) -> bool:
        """Whether some parameters are recorded by per-row autograd."""
        return bool(self._slow)

    # -- verification -------------------------------------------------------------------------------------------------

    def refreshed(self) -> None:
        """The coming step is one that takes its time anyway."""
        self._refreshes = True

    def due(self, step: int) -> bool:
        """Whether to verify a step's first batch: where asked for, and at refreshes ever more steps apart."""
        refreshes, self._refreshes = self._refreshes, False
        return bool(self.wanted) or (refreshes and self._last is not None and step >= max(1, 2 * self._last))

    def changed(self, passes: int) -> bool:
        """Whether the backward pass after so many is of a kind that was never verified: other layers, more calls."""
        return not self._uses(passes + 1) <= self._used

    @property
    def joining(self) -> bool:
        """Whether layers are called that had no part in any verification."""
        verified = {module for module, _ in self._used}
        return any(module not in verified for module, calls in self._capture.calls.items() if calls)

    def _uses(self, passes: int) -> set[tuple[nn.Module | nn.Parameter | str, int]]:
        """What the batch does: the calls of each layer, to a power of two, and its backward passes."""
        calls: set[tuple[nn.Module | nn.Parameter | str, int]]
        calls = {(one, n.bit_length()) for one, n in self._capture.calls.items() if n}
        return calls | {("pass", k) for k in range(passes)} | {("double backward", int(self._capture.double_backward))}

    def begin(self, fail: Callable[[Exception], None]) -> Verification:
        """Has each parameter's coming gradients compared with the sums of its per-sample gradients."""
        verification = Verification(fail, self._capture.unscale, keep=self._policy == "fallback")
        hooked = [name for name, p in self._module.named_parameters() if p._backward_hooks]
        note = f"{_HOOKED}: {', '.join(hooked[:4])}{', ...' if len(hooked) > 4 else ''}"
        if hooked and not any(each.startswith(_HOOKED) for each in self.notes):
            self.notes.append(note)
        if not is_sharded(self._module):
            for parameter in self._module.parameters():
                verification.watch(parameter, parameter)
        return verification

    def verify(self, verification: Verification, signals: Signals, processes: Lockstep, step: int, passes: int) -> bool:
        """Drops parameters whose per-sample gradients do not add up; False where gradients overflowed.

        Raises:
            CaptureError: If parameters are uncaptured under the policy ``"raise"``.
        """
        self.agree(processes)
        slow = set(self._slow.values())
        blocks = [block for block in signals.table if not slow.intersection(block.parameters)]
        of_no_row = self._capture.bare.of_no_row
        wrong, judged, finite = verification.judge(blocks, self._capture.half, self._capture.double_backward, of_no_row)
        if not all(there for there, _ in processes.exchange(int(finite))):
            self.wanted |= VERIFY
            return False
        # a block that not all processes used is not judged; one that is wrong in one of them is dropped in all
        common = processes.common(block.key for block in judged)
        right = processes.common(block.key for block in judged if block.key in common and block not in wrong)
        elsewhere = "its per-row gradients add up in this process, but not in another"
        failed = {b: wrong.get(b, elsewhere) for b in judged if b.key in common and b.key not in right}
        for block in set(signals.table).intersection(failed):  # of a layer lost in this very pass nothing is left
            signals.drop_block(block)
        captured = signals.table.captured()
        self._begin_naming(step)
        explained = captured | slow | verification.without_rows(of_no_row) | self._capture.waiting()
        dropped = self._capture.dropped | self._capture.unhooked(self._module)
        missing = uncaptured(self._module, explained, dropped, unknown=self._capture.bare.unknown)
        missing |= {signals.table.names[p]: reason for block, reason in failed.items() for p in block.parameters}
        self._miss(missing, captured)
        self._used |= self._uses(passes)
        self._verified.update(p for p in self._module.parameters() if p.requires_grad)
        self._dormant = [p for p in self._module.parameters() if p.requires_grad and p.grad is None]
        self._last, self._dropped = step, set(self._capture.dropped)
        return True

    def check_terms(
        self, loss: Callable[[nn.Module, Any], Tensor] | None, batch: Any, rows: int, verification: Verification
    ) -> None:
        """Finds out whether operations on parameters that are no uses belong to no row: penalties on weights."""
        known = self._capture.bare.of_no_row
        if self._capture.entries is not None:
            rows = self._capture.entries.leading(batch)
        if loss is not None and batch is not None and verification.has_unknown(known):
            with contextlib.suppress(Exception):  # of the user's code: the parameters will be named as left out
                find_terms_of_no_row(self._module, self._capture, loss, batch, rows, as_in_training)
        if known and _OF_NO_ROW not in self.notes:
            self.notes.append(_OF_NO_ROW)

    def agree_on(self, requests: Iterable[int]) -> None:
        """Takes what all processes asked of the next step."""
        self.requests, self.wanted = 0, self.wanted | max(requests)

    def watch_changes(self, signals: Signals, step: int) -> None:
        """After a backward pass: has something joined, was something dropped? Never synchronises with the device."""
        if self._last is None:
            return
        self.requests |= VERIFY * any(p.grad is not None for p in self._dormant)
        if len(self._dropped) == len(self._capture.dropped):
            return
        reasons = {n: why for n, why in self._capture.dropped.items() if n not in self._dropped}
        self._dropped.update(reasons)
        self._begin_naming(step)
        captured = signals.table.captured()
        missing = {
            name: reasons.get(name, reasons.get(name.rpartition(".")[0], ""))
            for name, p in self._module.named_parameters()
            if p.requires_grad and p not in captured and not reasons.keys().isdisjoint((name, name.rpartition(".")[0]))
        }
        self._miss(missing, set())
        self.requests |= VERIFY

    # -- what is missing ----------------------------------------------------------------------------------------------

    def _miss(self, missing: dict[str, str], captured: set[nn.Parameter]) -> None:
        """Names what was not missing before; the recorded fraction counts all that is missing."""
        for name, parameter in self._module.named_parameters():
            if parameter in captured:
                self._missing.pop(name, None)
                self.uncaptured.pop(name, None)
        new = {name: why for name, why in missing.items() if name not in self._missing}
        self._missing.update(new)
        self._verified.update(p for name, p in self._module.named_parameters() if name in new)  # nothing is to come
        self._capture.bare.refuse(new)
        self._measure_share()
        rest = {n: why for n, why in new.items() if n.rpartition(".")[0] not in self._capture.deselected}
        if len(rest) < len(new):
            left = fraction_of(self._module, set(new) - set(rest))
            self.notes.append(f"layers= leaves out {left:.1%} of the trainable parameters: scores speak for the others")
        if rest:
            self._apply_policy(rest)

    def _begin_naming(self, step: int) -> None:
        """What is named from here on is left out from this step on; at the start nothing need be said of that."""
        self._since = "" if self._last is None else f"from step {step} on (verified until step {self._last})"

    def _apply_policy(self, missing: dict[str, str]) -> None:
        if self._policy == "raise" and self._last is None:  # later there is no step left to refuse
            raise CaptureError(
                f"{self._told(missing)} Register a layer function, or pass uncaptured='warn' or 'fallback'."
            )
        if self._policy == "fallback" and not self._alone:
            return self._leave_out(missing, _NOT_ALONE)
        if self._policy == "fallback":
            parameters = dict(self._module.named_parameters())
            for name in missing:
                self._slow[name] = parameters[name]
                self._missing.pop(name)
            self._measure_share()
            self.notes.append(f"{_PER_ROW}{', '.join(missing)}")
            return
        self._leave_out(missing, _SLOWLY if self._advisable and self._alone else "")

    def _told(self, missing: dict[str, str]) -> str:
        fraction = fraction_of(self._module, missing)
        listing = "; ".join(
            f"{name} ({fraction_of(self._module, [name]):.1%}): {why}" for name, why in list(missing.items())[:8]
        )
        since = f" {self._since}" if self._since else ""
        return f"{self._owner}: {fraction:.1%} of the trainable parameters are not captured{since}: {listing}."

    def _leave_out(self, missing: dict[str, str], remedy: str) -> None:
        since = f", {self._since}" if self._since else ""
        self.uncaptured |= {
            n: f"{why} ({fraction_of(self._module, [n]):.1%} of the parameters{since})" for n, why in missing.items()
        }
        if since:  # the scores speak for fewer parameters than they did
            self.notes.append(self._told(missing).removeprefix(f"{self._owner}: ").rstrip("."))
        warnings.warn(f"{self._told(missing)} Signals leave them out{remedy}.", stacklevel=2)

    def nothing_left(self, rows: int) -> str:
        """Why no row can get a signal, and what can be done about it."""
        fractions: dict[str, float] = {}
        for name, why in self._missing.items():
            fractions[why] = fractions.get(why, 0.0) + fraction_of(self._module, [name])
        reason = max(fractions, key=lambda why: fractions[why], default=self.first_reason())
        told = f"no layer's gradients could be told apart by the batch's {rows} rows: {reason}."
        if not self._advisable or COMPARED in reason:
            return told + " Scores of rows need a loss that is a mean or a sum over rows."
        if MIXED in reason:  # it says itself what to do
            return told
        by_rows = any(words in reason for words in ("batch size", "is not led by", "no layer with"))
        check = "Check row_fn and the collate function" if by_rows else ""
        slowly = "" if self._policy == "fallback" else "use uncaptured='fallback' (one backward pass a row)"
        remedy = ", or ".join(part for part in (check, slowly) if part)
        return told + (f" {remedy[0].upper()}{remedy[1:]}." if remedy else "")

    def first_reason(self) -> str:
        """One reason, for the message when nothing is left."""
        return next(iter(self._capture.dropped.values()), "no layer with a known type was called")

    # -- per-row autograd ---------------------------------------------------------------------------------------------

    def fallback(
        self,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        batch: Any,
        rows: int,
        signals: Signals,
        verification: Verification | None,
    ) -> list[tuple[Block, GradSample]]:
        """Gradients of uncaptured parameters by one backward pass a row; with a verification of those that add up.

        Raises:
            CaptureError: If there is no loss or batch to differentiate again.
        """
        if not self._slow:
            return []
        if loss is None or batch is None:
            raise CaptureError(f"{self._owner}: uncaptured='fallback' needs loss= and the batch of every step.")
        parameters, of_no_row = list(self._slow.values()), self._capture.bare.of_no_row
        sums = None
        if verification is not None:
            slow = dict(self._slow)
            gradients = verification.of_rows(of_no_row)
            sums = FallbackVerification(self._module, loss, batch, rows, slow, signals.scale, gradients, of_no_row)

        def factor(contributions: list[Tensor]) -> float:
            if sums is not None and rows > 1:
                self._summed = sums.is_sum(contributions, self._summed)
            return float(rows) if self._summed else 1.0

        found = row_contributions(self._module, loss, batch, rows, parameters, signals.scale, factor, of_no_row)
        contributions = dict(zip(self._slow, found, strict=True))
        if sums is not None:
            wrong, approximate = sums.judge(contributions)
            self.approximate |= approximate
            self._drop_slow(wrong, signals)
        return [
            (signals.table.vector(p), Vector(contributions[name].reshape(rows, -1))) for name, p in self._slow.items()
        ]

    def _drop_slow(self, wrong: dict[str, str], signals: Signals) -> None:
        """Leaves out parameters whose rows' contributions, taken one by one, do not add up."""
        if not wrong:
            return
        self.notes = [note for note in self.notes if not note.startswith(_PER_ROW)]
        if left := [name for name in self._slow if name not in wrong]:
            self.notes.append(f"{_PER_ROW}{', '.join(left)}")
        for name in wrong:
            parameter = self._slow.pop(name)
            for block in [block for block in signals.table if parameter in set(block.parameters)]:
                signals.drop_block(block)
        self._missing |= wrong
        self._measure_share()
        self._leave_out(wrong, "")
