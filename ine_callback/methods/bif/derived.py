"""Losses of single rows out of a module's own step, and what each counts in the loss that the step returns.

The step's loss is taken apart as L = Σᵢ Wᵢ ℓᵢ. ℓᵢ is the mean of the row's own terms, Wᵢ what the step makes of them:
one row of many, its tokens of all tokens, its class's weight, its part of a mask. W comes from one pass in which the
terms are the leaves of the graph, so whatever the step does after its loss is told exactly. It is proved that nothing
else enters the loss, that W does not depend on the weights, and that a row's ℓ does not depend on the rows beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ine_callback.data.batches import cut, is_all_led_by
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.flat import Caller
from ine_callback.methods.bif.intercept import Found, Intercept, Terms
from ine_callback.methods.bif.rows import (
    AS_IT_IS,
    LARGEST,
    MISCUT,
    REMEDY,
    SAMPLE,
    Batch,
    RowLosses,
    Rows,
    alike,
    rows_in,
    spread,
)
from ine_callback.queries.module_loss import call_step

_SMALL = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative errors of sums; half precision: 2e-2
_CHANGE = 0.1  # of the weights, to see whether what rows count depends on them
_GROWS = "returned a loss that is the mean of none of its standard losses: it grows with the rows of the batch (a sum?)"
_APART = "gives rows another loss when other rows are beside them (contrasts within a batch, time first?)"


class _Refused(Exception):
    """Why a step's loss cannot be taken apart."""


@dataclass(frozen=True)
class _Reading:
    """One pass of a step: what it makes of its terms.

    Attributes:
        number: Which of its standard losses it returns.
        call: That loss's terms.
        factors: The loss's derivative by each term.
    """

    number: int
    call: Terms
    factors: Tensor

    def of_rows(self, rows: int, last: bool) -> _Parts:
        def laid_out(values: Tensor) -> Tensor:
            found = self.call.laid_out(values, rows, last)
            if found is None:
                raise _Refused(f"has {values.numel()} terms for {rows} rows")
            return found

        losses, mass, factors = map(laid_out, (self.call.losses.detach(), self.call.mass, self.factors))
        weights = (factors * mass).sum(1)
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.any()):
            raise _Refused("weighs rows by numbers that are negative, not finite, or all 0")
        counts = torch.where(weights[:, None] > 0, factors / weights[:, None], 0.0)
        losses = (counts * torch.where(counts == 0, 0.0, losses)).sum(1)
        if not bool(torch.isfinite(losses).all()):
            raise _Refused("has losses that are not finite at the trained weights")
        return _Parts(losses, weights, counts)


@dataclass(frozen=True)
class _Parts:
    """L = Σᵢ Wᵢ ℓᵢ.

    Attributes:
        losses: ℓ [b].
        weights: W [b].
        counts: What each term counts in ℓ [b, T].
    """

    losses: Tensor
    weights: Tensor
    counts: Tensor


def derive(module: nn.Module, name: str, batch: Batch, count: int | None) -> RowLosses | str:
    """Row losses out of the one standard loss in a module's step, or why that cannot be.

    Args:
        module: The module, isolated.
        name: Of the step.
        batch: A batch.
        count: Its rows, where they are known.
    """
    size = rows_in(batch, count)
    why = ""
    if size is not None:
        sample = cut(batch, spread(size, SAMPLE), size)
        try:
            return _by_rows(module, name, sample, min(SAMPLE, size))
        except (*MISCUT, _Refused) as error:
            if is_all_led_by(batch, size):
                if isinstance(error, _Refused):
                    return str(error)
                raise
            why = f", and its rows cannot be cut out ({str(error).splitlines()[0]})"
    try:
        return _whole(module, name, batch, count)
    except _Refused as error:
        return f"{error}{why}"


def _by_rows(module: nn.Module, name: str, sample: Batch, size: int) -> RowLosses:
    """Proves a step's loss on a batch that can be cut, with rows first or last."""
    reading = _read(module, name, sample, connected=True)
    _prove_constant(module, name, sample, reading)
    try:
        return _proved(module, name, sample, size, reading, last=False)
    except _Refused:
        if reading.call.losses.numel() <= size:
            raise
        with contextlib.suppress(_Refused):  # the first reason is the one that users understand
            return _proved(module, name, sample, size, reading, last=True)
        raise


def _proved(module: nn.Module, name: str, sample: Batch, size: int, reading: _Reading, last: bool) -> RowLosses:
    """Proves on cuts of a batch that what is read is each row's own."""
    whole = reading.of_rows(size, last)
    anchor = int(whole.weights.argmax())
    found = Derived(name, reading.number, last, False)
    steady, by_row = True, True
    for others in (torch.arange(size // 2), torch.tensor([size - 1]), torch.tensor([size // 2])):
        index = torch.cat([torch.tensor([anchor]), others[others != anchor]])
        if not 1 < len(index) < size:
            continue  # a batch of one row may lose its dimension in the step
        part = found.read(module, cut(sample, index, size), len(index))
        same = whole.weights[index] / whole.weights[anchor]
        if not alike(part.losses, whole.losses[index]) or not _close(part.weights / part.weights[0], same):
            raise _Refused(_APART)
        steady &= _close(part.weights.sum(), whole.weights.sum())
        by_row &= _close(part.weights[0] * len(index), whole.weights[anchor] * size)
    if not (steady or by_row):
        raise _Refused(_GROWS)
    return found


def _whole(module: nn.Module, name: str, batch: Batch, count: int | None) -> RowLosses:
    """Takes a step's loss of a batch that cannot be cut apart, where every term is led by its row."""
    reading = _read(module, name, batch, connected=True)
    _prove_constant(module, name, batch, reading)
    call = reading.call
    if call.kept is not None or call.losses.dim() == 0 or count not in (None, len(call.losses)):
        raise _Refused(f"has {call.losses.numel()} terms for {count or 'an unknown number of'} rows")
    reading.of_rows(len(call.losses), last=False)
    return Derived(name, reading.number, False, True)


def _prove_constant(module: nn.Module, name: str, batch: Batch, reading: _Reading) -> None:
    """Proves that what terms count does not depend on the weights, by changing these a little."""

    def change(p: Tensor) -> Tensor:
        signs = torch.linspace(-1, 1, p.numel(), dtype=p.dtype, device=p.device).view_as(p)
        return p.detach() * (1 + _CHANGE * signs)

    caller = Caller(module)
    changed = {key: change(p) for key, p in caller.named_parameters() if p.requires_grad}
    seen: list[_Reading] = []

    def again(module: nn.Module, batch: Batch) -> Tensor:
        seen.append(_read(module, name, batch, connected=False))
        return seen[0].factors

    functional_call(caller, changed, (again, batch))
    if seen[0].number != reading.number or not _close(seen[0].factors, reading.factors):
        raise _Refused("weighs its terms by what the model says (a focal loss?)")


def _read(module: nn.Module, name: str, batch: Batch, connected: bool) -> _Reading:
    """Runs a step; ``connected``: with the graph, to see whether anything but its terms leads to the weights."""
    recorder = Intercept()
    with torch.set_grad_enabled(connected), recorder:
        output = call_step(module, name, batch)
    value = output.get("loss") if isinstance(output, Mapping) else output
    calls = recorder.calls
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise _Refused("returned no loss")
    if not bool(torch.isfinite(value)):
        raise _Refused(f"returned {float(value.detach())}, which is not finite")
    returned = f"returned {float(value.detach()):.6g}, which is the mean of none of its {len(calls)} standard losses"
    if not calls:
        raise _Refused("computes its loss without a standard loss of torch.nn.functional")
    parameters = [p for p in module.parameters() if p.requires_grad] if connected else []
    sources = [*(call.losses for call in calls), *parameters]
    found = torch.autograd.grad(value.reshape(()), sources, allow_unused=True) if value.requires_grad else ()
    used = [k for k, slope in enumerate(found) if slope is not None and bool((slope != 0).any())]
    numbers = [k for k in used if k < len(calls)]
    if not numbers:
        raise _Refused(returned)
    if len(numbers) > 1:
        raise _Refused(f"{returned}: it adds up {len(numbers)} of them")
    if len(used) > 1:
        raise _Refused(f"{returned}: something else depends on the weights (a penalty, another loss, a learned factor)")
    call, factors = calls[numbers[0]], found[numbers[0]]
    parts = torch.where(factors == 0, 0.0, call.losses.detach() * factors)
    small = _SMALL.get(value.dtype, 2e-2)
    if recorder.odd or not float((parts.sum() - value.detach()).abs()) <= small * float(parts.abs().sum()):
        raise _Refused(f"{returned}: it is no weighted sum of one's terms")
    return _Reading(numbers[0], call, factors)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding, beside the largest."""
    small = _SMALL.get(expected.dtype, 2e-2)
    return found.shape == expected.shape and bool(((found - expected).abs() <= small * expected.abs().max()).all())


class Derived(RowLosses):
    """The losses of the rows from the ``number``-th standard loss of the module's step, the rest of which is not run.

    What comes after the loss (metrics, logging) often cannot run under ``vmap``; what it makes of the terms is known
    from :meth:`rows`.

    Args:
        name: Of the step.
        number: Of the standard loss.
        last: Whether rows are the last dimension of the terms.
        whole: Whether the batch cannot be cut.
    """

    def __init__(self, name: str, number: int, last: bool, whole: bool) -> None:
        self._name, self._number, self._last, self.whole = name, number, last, whole
        if whole:
            self.note = AS_IT_IS
        elif name == "validation_step":
            self.note = "row losses are those of validation_step, for training_step's cannot be told"

    def read(self, module: nn.Module, batch: Batch, size: int) -> _Parts:
        """One pass."""
        reading = _read(module, self._name, batch, connected=False)
        if reading.number != self._number:
            raise _Refused("returns now one, now another of its standard losses")
        return reading.of_rows(size, self._last)

    def rows(self, module: nn.Module, batch: Batch, largest: int = LARGEST, count: int | None = None) -> Rows:
        try:
            return self._rows(module, batch, largest, count)
        except _Refused as error:
            raise InfluenceError(f"BIF: {self._name} {error}.") from error

    def _rows(self, module: nn.Module, batch: Batch, largest: int, count: int | None) -> Rows:
        if self.whole:
            reading = _read(module, self._name, batch, connected=False)
            parts = reading.of_rows(len(reading.call.losses), last=False)
            entries = len(parts.weights)
            picked = torch.arange(entries, device=parts.weights.device)
            return Rows(batch, entries, entries * parts.weights, parts.counts, picked)
        size = rows_in(batch, count)
        if size is None:
            raise _Refused("got a batch no part of which is led by its rows")
        parts = self.read(module, batch, size) if size <= largest else self._in_pieces(module, batch, size, largest)
        return Rows(batch, size, size * parts.weights, parts.counts)

    def _in_pieces(self, module: nn.Module, batch: Batch, size: int, largest: int) -> _Parts:
        """What rows count in the loss of more of them than a pass takes: beside one that is in every pass."""
        few = spread(size, largest)
        anchor = int(few[self.read(module, cut(batch, few, size), largest).weights.argmax().cpu()])

        def beside(others: Tensor) -> _Parts:
            return self.read(module, cut(batch, torch.cat([torch.tensor([anchor]), others]), size), 1 + len(others))

        found = [beside(others) for others in torch.arange(size).split(largest)]
        width = max(parts.counts.shape[1] for parts in found)
        counts = torch.cat([F.pad(parts.counts[1:], (0, width - parts.counts.shape[1])) for parts in found])
        losses = torch.cat([parts.losses[1:] for parts in found])
        weights = torch.cat([parts.weights[1:] / parts.weights[0] for parts in found])
        # divided by the rows, or by what they count: two batches tell, one of heavy rows and one of light ones
        heavy, light = beside(weights.argmax().cpu()[None]), beside(weights.argmin().cpu().repeat(2))
        if _close(heavy.weights.sum(), light.weights.sum()):
            return _Parts(losses, weights * heavy.weights.sum() / weights.sum(), counts)
        if _close(2 * heavy.weights[0], 3 * light.weights[0]):
            return _Parts(losses, weights * 2 * heavy.weights[0] / size, counts)
        raise _Refused(_GROWS)

    def terms(self, module: nn.Module, rows: Rows) -> Tensor:
        found = self._reach(module, rows.batch)
        losses = found.laid_out(found.losses, rows.size, self._last)
        if losses is None or rows.counts is None:
            raise InfluenceError(f"BIF: {self._name} has {found.losses.numel()} terms for {rows.size} rows; {REMEDY}.")
        if rows.picked is not None:
            losses = losses[rows.picked]
        counts = rows.counts[:, : losses.shape[1]]  # some models trim a batch to its longest row
        return torch.where(counts == 0, 0.0, losses) * counts

    def _reach(self, module: nn.Module, batch: Batch) -> Terms:
        try:
            with Intercept(self._number):
                call_step(module, self._name, batch)
        except Found as found:
            return found.terms
        raise InfluenceError(
            f"BIF: {self._name} did not reach its loss number {self._number + 1} on this batch; {REMEDY}."
        )
