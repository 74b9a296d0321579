"""Losses inside of torch.compile: the compiled graph tells the loss of every term, which no eager graph holds there.

A compiled model that computes its own loss, as those of Hugging Face do, leaves nothing for
:func:`.row_losses.read_loss`. So hooks of the compiled module, which are traced, begin and end a mode of torch
functions. Where the loss is called, the mode also computes the terms' losses, from the same logits; and the backward
pass tells them, with the gradient of the loss's value, which is the coefficient that it has in what is differentiated.

The mode is only used where the first batch, run as it is written, has shown one loss of a known form inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.compiled import LIBRARY
from ine_callback.capture.row_losses import LossReading, read_loss, reading_of, wide
from ine_callback.capture.row_margins import LIMIT, read_margins
from ine_callback.utilities.isolation import compiled_parts, isolated

Told = Callable[[LossReading | None, Tensor | None], None]

_numbers = count()
_losses: WeakValueDictionary[int, CompiledLoss] = WeakValueDictionary()

LIBRARY.define("tell(Tensor gradient, Tensor[] terms, str reduction, int number) -> Tensor")


@torch.library.impl(LIBRARY, "tell", "CompositeExplicitAutograd")
def _tell(gradient: Tensor, terms: list[Tensor], reduction: str, number: int) -> Tensor:
    loss = _losses.get(number)
    if loss is not None:
        loss.take(gradient, terms, reduction)
    return gradient.clone()


torch.library.register_fake("ine_callback::tell", lambda gradient, *_: gradient.clone(), lib=LIBRARY)


class _Telling(torch.autograd.Function):
    """The loss's value; in the backward pass it tells the terms, before any layer's turn comes."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, losses: Tensor, weights: Tensor, labels: Tensor, margins: Tensor, how: str, number: int
    ) -> Tensor:
        ctx.save_for_backward(losses, weights, labels, margins)
        ctx.how, ctx.number = how, number
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        told = torch.ops.ine_callback.tell(gradient, list(ctx.saved_tensors), ctx.how, ctx.number)
        return told, None, None, None, None, None, None


class _Mode(TorchFunctionMode):
    """Tells the losses of known forms that are called while it lasts; the compiler traces it."""

    def __init__(self, number: int, margins: bool) -> None:
        super().__init__()
        self.number, self.margins = number, margins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, value = kwargs or {}, func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():
            return value
        if func is F.cross_entropy and _is_known(*args, **kwargs):
            terms, how = _cross_entropy(self.margins, *args, **kwargs)
        elif func is F.mse_loss:
            terms, how = _mse(*args, **kwargs)
        elif func is F.binary_cross_entropy_with_logits:
            terms, how = _binary(self.margins, *args, **kwargs)
        else:
            return value
        return _Telling.apply(value, *terms, how, self.number)  # type: ignore[no-untyped-call]


def _is_known(input: Tensor, target: Tensor, *_: Any, label_smoothing: float = 0.0, **__: Any) -> bool:
    """Whether a cross entropy has a class for each term; smoothed ones, and probabilities, are of no known form."""
    return not target.is_floating_point() and label_smoothing == 0.0


Terms = tuple[list[Tensor], str]  # losses, weights, labels, margins (empty: none); and the reduction


@torch.no_grad()
def _cross_entropy(
    with_margins: bool,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Terms:
    logits, nothing = wide(input), target.new_empty(0)
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    ignored = target == ignore_index
    label = target.masked_fill(ignored, 0)
    weights = torch.ones_like(losses) if weight is None else weight[label].to(losses.dtype)
    margins = nothing
    if with_margins:
        others = logits.scatter(1, label.unsqueeze(1), -torch.inf).amax(1)
        margins = (logits.gather(1, label.unsqueeze(1)).squeeze(1) - others).masked_fill(ignored, torch.nan)
    return [losses, weights.masked_fill(ignored, 0.0), target, margins], reduction


@torch.no_grad()
def _mse(
    input: Tensor,
    target: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,  # torch 2.7 and newer; with one the loss is of no known form
) -> Terms:
    losses = (wide(input) - wide(target)).square()
    return [losses, torch.ones_like(losses), losses.new_empty(0), losses.new_empty(0)], reduction


@torch.no_grad()
def _binary(
    with_margins: bool,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Terms:
    logits, wanted = wide(input), wide(target)
    losses = F.binary_cross_entropy_with_logits(logits, wanted, weight, pos_weight=pos_weight, reduction="none")
    margins = losses.new_empty(0)
    if with_margins:
        margins = (logits * (2 * wanted - 1)).masked_fill((wanted != 0) & (wanted != 1), torch.nan).flatten()
    return [losses, torch.ones_like(losses), losses.new_empty(0), margins], reduction


class _Looking(TorchFunctionMode):
    """Counts the losses of known forms that are called while a compiled module runs, as it was written."""

    def __init__(self, loss: CompiledLoss) -> None:
        super().__init__()
        self.loss, self.found = loss, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = func in (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)
        self.found += known and self.loss.depth > 0
        return func(*args, **(kwargs or {}))


class CompiledLoss:
    """The loss that compiled modules compute by themselves.

    Args:
        module: The model.
        told: Called in the backward pass with what the loss contains (None: it has other terms than the batch has
            rows) and with the rows' margins, before the first per-sample gradient.

    Attributes:
        inside: Whether the loss is computed in compiled code; known when :meth:`look` has been called.
        depth: How many compiled modules run at the moment, as they were written.
    """

    def __init__(self, module: nn.Module, told: Told) -> None:
        self._module, self._told = module, told
        self._parts: list[nn.Module] = [getattr(part, "_orig_mod", part) for part in compiled_parts(module)]
        self.inside, self.depth, self.rows, self.views = False, 0, 0, 1
        self._number = next(_numbers)
        self._mode = _Mode(self._number, margins=False)
        self._handles: list[RemovableHandle] = []
        _losses[self._number] = self

    def _attach(self) -> None:
        for part in self._parts:
            self._handles.append(part.register_forward_pre_hook(self._enter))
            self._handles.append(part.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.depth += 1
        elif self.inside:
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.depth -= 1
        elif self.inside:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def look(self, loss: Callable[[nn.Module, Any], Any] | None, batch: Any, rows: int, views: int) -> None:
        """Runs the first batch isolated, as it is written, to see whether one loss of a known form is inside."""
        if not self._parts or loss is None or batch is None:
            return
        self._attach()
        with contextlib.suppress(Exception), isolated(self._module), torch.enable_grad(), _Looking(self) as looking:
            value = loss(self._module, batch)
            reading = read_loss(value, rows, views)
            self.inside = reading is not None and looking.found == 1
            self._mode.margins = read_margins(value, rows) is not None
        if not self.inside:
            self.detach()

    def take(self, gradient: Tensor, terms: Sequence[Tensor], reduction: str) -> None:
        """Takes what the compiled backward pass tells."""
        losses, weights, labels, margins = (x.detach().flatten() for x in terms)
        classes, reading = labels if labels.numel() else None, None
        with contextlib.suppress(Exception):  # never raised into the training's backward pass
            reading = reading_of(losses, weights, classes, reduction, gradient, self.rows, self.views)
        known = margins.numel() == self.rows
        self._told(reading, margins.clamp(-LIMIT, LIMIT) if known else None)
