"""Row losses out of a module's own step, with the weight of each row in the loss that the step returns.

The step's loss is split as L = Σᵢ Wᵢ ℓᵢ. ℓᵢ is the mean of the row's own terms, and Wᵢ is the row's weight: one row of
n, its tokens of all tokens, its class's weight, its part of a mask. W comes from one pass in which the terms are leaves
of the graph, so it is exact whatever the step does after its loss. It is verified that nothing else enters the loss,
that W does not depend on the model's weights, and that a row's ℓ does not depend on the rows beside it.
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
from ine_callback.methods.bif.flat_module import Caller
from ine_callback.methods.bif.loss_interception import InterceptLosses, LossTerms, TermsFound
from ine_callback.methods.bif.rows import (
    CUT_ERRORS,
    MAX_PASS_ROWS,
    REMEDY,
    SAMPLE_ROWS,
    WHOLE_BATCH_NOTE,
    Batch,
    RowLosses,
    Rows,
    alike,
    rows_in,
    spread,
)
from ine_callback.queries.module_loss import call_step

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative error of sums
_HALF_TOLERANCE = 2e-2  # in half precision
_TRIAL_CHANGE = 0.1  # of the model's weights, to find whether rows' weights depend on them
_GROWS = "returned a loss that is the mean of none of its standard losses: it grows with the rows of the batch (a sum?)"
_NOT_ALONE = "gives rows another loss when other rows are beside them (contrasts within a batch, time first?)"


class _Refused(Exception):
    """Says why a step's loss cannot be split into row losses."""


@dataclass(frozen=True)
class _Reading:
    """What one pass of a step shows.

    Attributes:
        number: Number of the standard loss that it returns.
        call: The terms of that loss.
        factors: Derivative of the returned loss with respect to each term.
    """

    number: int
    call: LossTerms
    factors: Tensor

    def of_rows(self, rows: int, last: bool) -> _Parts:
        """Row losses and weights; ``last``: rows are the last dimension of the terms."""

        def laid_out(values: Tensor) -> Tensor:
            found = self.call.laid_out(values, rows, last)
            if found is None:
                raise _Refused(f"has {values.numel()} terms for {rows} rows")
            return found

        losses, call_weights, factors = map(laid_out, (self.call.losses.detach(), self.call.weights, self.factors))
        weights = (factors * call_weights).sum(1)
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.any()):
            raise _Refused("weighs rows by numbers that are negative, not finite, or all 0")
        term_weights = torch.where(weights[:, None] > 0, factors / weights[:, None], 0.0)
        losses = (term_weights * torch.where(term_weights == 0, 0.0, losses)).sum(1)
        if not bool(torch.isfinite(losses).all()):
            raise _Refused("has losses that are not finite at the trained weights")
        return _Parts(losses, weights, term_weights)


@dataclass(frozen=True)
class _Parts:
    """L = Σᵢ Wᵢ ℓᵢ.

    Attributes:
        losses: ℓ [b].
        weights: W [b].
        term_weights: Weight of each term in ℓ [b, T].
    """

    losses: Tensor
    weights: Tensor
    term_weights: Tensor


def derive(module: nn.Module, name: str, batch: Batch, count: int | None) -> RowLosses | str:
    """Row losses out of the one standard loss in a module's step, or why that is impossible.

    Args:
        module: The module, isolated.
        name: Name of the step.
        batch: A batch.
        count: Its rows, where known.
    """
    size = rows_in(batch, count)
    why = ""
    if size is not None:
        sample = cut(batch, spread(size, SAMPLE_ROWS), size)
        try:
            return _by_rows(module, name, sample, min(SAMPLE_ROWS, size))
        except (*CUT_ERRORS, _Refused) as error:
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
    """Row losses of a batch that can be cut; rows are the first or the last dimension of the terms."""
    reading = _read(module, name, sample, connected=True)
    _verify_weights(module, name, sample, reading)
    try:
        return _verified(module, name, sample, size, reading, last=False)
    except _Refused:
        if reading.call.losses.numel() <= size:
            raise
        with contextlib.suppress(_Refused):  # users understand the first reason
            return _verified(module, name, sample, size, reading, last=True)
        raise


def _verified(module: nn.Module, name: str, sample: Batch, size: int, reading: _Reading, last: bool) -> RowLosses:
    """Verifies on parts of a batch that losses and weights of rows do not depend on other rows."""
    whole = reading.of_rows(size, last)
    anchor = int(whole.weights.argmax())
    found = StepRowLosses(name, reading.number, last, False)
    constant_sum, by_count = True, True
    for others in (torch.arange(size // 2), torch.tensor([size - 1]), torch.tensor([size // 2])):
        index = torch.cat([torch.tensor([anchor]), others[others != anchor]])
        if not 1 < len(index) < size:
            continue  # a batch of one row may lose its dimension in the step
        part = found.read(module, cut(sample, index, size), len(index))
        ratios = whole.weights[index] / whole.weights[anchor]
        if not alike(part.losses, whole.losses[index]) or not _close(part.weights / part.weights[0], ratios):
            raise _Refused(_NOT_ALONE)
        constant_sum &= _close(part.weights.sum(), whole.weights.sum())
        by_count &= _close(part.weights[0] * len(index), whole.weights[anchor] * size)
    if not (constant_sum or by_count):
        raise _Refused(_GROWS)
    return found


def _whole(module: nn.Module, name: str, batch: Batch, count: int | None) -> RowLosses:
    """Row losses of a batch that cannot be cut; rows are the first dimension of the terms."""
    reading = _read(module, name, batch, connected=True)
    _verify_weights(module, name, batch, reading)
    call = reading.call
    if call.mask is not None or call.losses.dim() == 0 or count not in (None, len(call.losses)):
        raise _Refused(f"has {call.losses.numel()} terms for {count or 'an unknown number of'} rows")
    reading.of_rows(len(call.losses), last=False)
    return StepRowLosses(name, reading.number, False, True)


def _verify_weights(module: nn.Module, name: str, batch: Batch, reading: _Reading) -> None:
    """Verifies that terms' weights do not depend on the model's weights, by changing these a little."""

    def change(p: Tensor) -> Tensor:
        signs = torch.linspace(-1, 1, p.numel(), dtype=p.dtype, device=p.device).view_as(p)
        return p.detach() * (1 + _TRIAL_CHANGE * signs)

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
    """Runs a step; ``connected``: with the model in the graph, to find what else depends on its weights."""
    recorder = InterceptLosses()
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
    tolerance = _TOLERANCE.get(value.dtype, _HALF_TOLERANCE)
    if recorder.mismatch or not float((parts.sum() - value.detach()).abs()) <= tolerance * float(parts.abs().sum()):
        raise _Refused(f"{returned}: it is no weighted sum of one's terms")
    return _Reading(numbers[0], call, factors)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding, relative to the largest entry."""
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    return found.shape == expected.shape and bool(((found - expected).abs() <= tolerance * expected.abs().max()).all())


class StepRowLosses(RowLosses):
    """Row losses from the ``number``-th standard loss of the module's step, which then ends.

    The rest of the step (metrics, logging) often cannot run under ``vmap``. What it does to the terms is known from
    :meth:`rows`.

    Args:
        name: Name of the step.
        number: Number of the standard loss.
        last: Whether rows are the last dimension of the terms.
        whole: Whether the batch cannot be cut.
    """

    def __init__(self, name: str, number: int, last: bool, whole: bool) -> None:
        self._name, self._number, self._last, self.whole = name, number, last, whole
        if whole:
            self.note = WHOLE_BATCH_NOTE
        elif name == "validation_step":
            self.note = "row losses are those of validation_step, because those of training_step are unknown"

    def read(self, module: nn.Module, batch: Batch, size: int) -> _Parts:
        """Losses and weights of rows, from one pass of the step."""
        reading = _read(module, self._name, batch, connected=False)
        if reading.number != self._number:
            raise _Refused("returns now one, now another of its standard losses")
        return reading.of_rows(size, self._last)

    def rows(self, module: nn.Module, batch: Batch, max_rows: int = MAX_PASS_ROWS, count: int | None = None) -> Rows:
        try:
            return self._rows(module, batch, max_rows, count)
        except _Refused as error:
            raise InfluenceError(f"BIF: {self._name} {error}.") from error

    def _rows(self, module: nn.Module, batch: Batch, max_rows: int, count: int | None) -> Rows:
        if self.whole:
            reading = _read(module, self._name, batch, connected=False)
            parts = reading.of_rows(len(reading.call.losses), last=False)
            entries = len(parts.weights)
            picked = torch.arange(entries, device=parts.weights.device)
            return Rows(batch, entries, entries * parts.weights, parts.term_weights, picked)
        size = rows_in(batch, count)
        if size is None:
            raise _Refused("got a batch without any tensor or list that holds its rows")
        parts = self.read(module, batch, size) if size <= max_rows else self._in_pieces(module, batch, size, max_rows)
        return Rows(batch, size, size * parts.weights, parts.term_weights)

    def _in_pieces(self, module: nn.Module, batch: Batch, size: int, max_rows: int) -> _Parts:
        """Losses and weights of more rows than one pass takes, relative to a row that is in every pass."""
        few = spread(size, max_rows)
        anchor = int(few[self.read(module, cut(batch, few, size), max_rows).weights.argmax().cpu()])

        def beside(others: Tensor) -> _Parts:
            return self.read(module, cut(batch, torch.cat([torch.tensor([anchor]), others]), size), 1 + len(others))

        found = [beside(others) for others in torch.arange(size).split(max_rows)]
        width = max(parts.term_weights.shape[1] for parts in found)
        padded = [F.pad(parts.term_weights[1:], (0, width - parts.term_weights.shape[1])) for parts in found]
        term_weights = torch.cat(padded)
        losses = torch.cat([parts.losses[1:] for parts in found])
        weights = torch.cat([parts.weights[1:] / parts.weights[0] for parts in found])
        # the loss may be divided by the number of rows or by the sum of weights: a batch of heavy rows and one of light
        # rows show which
        heavy, light = beside(weights.argmax().cpu()[None]), beside(weights.argmin().cpu().repeat(2))
        if _close(heavy.weights.sum(), light.weights.sum()):
            return _Parts(losses, weights * heavy.weights.sum() / weights.sum(), term_weights)
        if _close(2 * heavy.weights[0], 3 * light.weights[0]):
            return _Parts(losses, weights * 2 * heavy.weights[0] / size, term_weights)
        raise _Refused(_GROWS)

    def terms(self, module: nn.Module, rows: Rows) -> Tensor:
        found = self._intercepted(module, rows.batch)
        losses = found.laid_out(found.losses, rows.size, self._last)
        if losses is None or rows.term_weights is None:
            raise InfluenceError(f"BIF: {self._name} has {found.losses.numel()} terms for {rows.size} rows; {REMEDY}.")
        if rows.picked is not None:
            losses = losses[rows.picked]
        term_weights = rows.term_weights[:, : losses.shape[1]]  # some models trim a batch to its longest row
        return torch.where(term_weights == 0, 0.0, losses) * term_weights

    def _intercepted(self, module: nn.Module, batch: Batch) -> LossTerms:
        try:
            with InterceptLosses(self._number):
                call_step(module, self._name, batch)
        except TermsFound as found:
            return found.terms
        raise InfluenceError(
            f"BIF: {self._name} did not reach its loss number {self._number + 1} on this batch; {REMEDY}."
        )
