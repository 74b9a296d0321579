"""Each row's loss of a module on a batch, differentiable and under ``torch.func``: given, offered, or derived.

:mod:`ine_callback.capture.row_losses` reads losses off the autograd graph of a training step. Chains need more: the
losses as a function of the weights, many weights at once. So here the reduction inside the module's own step is
intercepted.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ine_callback.data.batches import cut, size_of
from ine_callback.errors import InfluenceError
from ine_callback.queries.module_loss import call_step

Batch = Any
RowLoss = Callable[[nn.Module, Batch], Tensor]

# Losses that can be asked for their unreduced terms. All take `reduction`, all reduce over terms led by the row.
_LOSSES: dict[Any, str] = {
    getattr(F, name): name
    for name in (
        "cross_entropy",
        "nll_loss",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
        "poisson_nll_loss",
        "gaussian_nll_loss",
        "soft_margin_loss",
        "hinge_embedding_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "margin_ranking_loss",
        "cosine_embedding_loss",
        "triplet_margin_loss",
    )
}
_TOLERANCE = 1e-3  # relative; the terms may be in half precision
REMEDY = "pass loss_fn=lambda module, batch: losses of shape [rows], or give the module a method influence_loss(batch)"


class RowLosses(ABC):
    """Losses [b] of a batch's rows: ``losses(module, batch)``."""

    @abstractmethod
    def terms(self, module: nn.Module, batch: Batch) -> Tensor:
        """What each term (the token of a sequence) adds to its row's loss [b, T]; T is 1 for rows of one term."""

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.terms(module, batch).sum(1)


def row_losses(
    module: nn.Module,
    batch: Batch,
    loss_fn: RowLoss | None = None,
    owner: str = "BIF",
    steps: Sequence[str] = ("training_step", "validation_step"),
) -> RowLosses:
    """Finds out how to get each row's loss, and proves it on a batch.

    First choice is ``loss_fn``, then the module's ``influence_loss(batch)``; else the standard loss inside the module's
    ``training_step`` (or ``validation_step``) is asked for its terms, which are averaged over each row. The step must
    return their mean: weights of classes or rows are refused.

    Args:
        module: The model, isolated and in evaluation mode (:func:`ine_callback.utilities.isolation.isolated`).
        batch: At least one row, on the module's device.
        loss_fn: ``(module, batch) -> losses [b]``, or [b, T] for rows of T terms, whose mean is the row's loss.
        owner: Class named in messages.
        steps: Steps to look for a loss in, best first.

    Raises:
        InfluenceError: If none of the three works; the message says what to pass.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self(batch[0]), batch[1])
        >>> model, batch = Model(3, 1), (torch.randn(4, 3), torch.randn(4, 1))
        >>> row_losses(model, batch)(model, batch).shape
        torch.Size([4])
    """
    if loss_fn is not None:
        return _checked(loss_fn, "loss_fn", module, batch, owner)
    if hasattr(module, "influence_loss"):
        return _checked(_offered, "influence_loss", module, batch, owner)
    reasons = []
    for name in steps:
        if name == "training_step" and not getattr(module, "automatic_optimization", True):
            reasons.append("training_step optimizes by hand")
            continue
        if not callable(getattr(module, name, None)):
            continue
        found = _derive(module, name, batch)
        if not isinstance(found, str):
            return found
        reasons.append(f"{name} {found}")
    why = "; ".join(reasons) or f"{type(module).__name__} has no training_step"
    raise InfluenceError(f"{owner}: the losses of single rows are unknown ({why}); {REMEDY}.")


def note_on(losses: RowLosses) -> str | None:
    """What the report should say about where the row losses come from."""
    if isinstance(losses, _Derived) and losses.name == "validation_step":
        return "row losses are those of validation_step, for training_step's are not the mean of a standard loss"
    return None


def _offered(module: Any, batch: Batch) -> Tensor:
    losses: Tensor = module.influence_loss(batch)
    return losses


def _checked(function: RowLoss, name: str, module: nn.Module, batch: Batch, owner: str) -> RowLosses:
    with torch.no_grad():
        losses = function(module, batch)
    rows = size_of(batch)
    if not isinstance(losses, Tensor) or losses.dim() not in (1, 2) or len(losses) != rows:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InfluenceError(
            f"{owner}: {name} returned {got} for a batch of {rows} rows; return losses [{rows}], or [{rows}, terms]."
        )
    return _Given(function)


class _Given(RowLosses):
    """Losses of a user's function."""

    def __init__(self, function: RowLoss) -> None:
        self._function = function

    def terms(self, module: nn.Module, batch: Batch) -> Tensor:
        losses = self._function(module, batch)
        return losses[:, None] if losses.dim() == 1 else losses / losses.shape[1]


def _derive(module: nn.Module, name: str, batch: Batch) -> RowLosses | str:
    """A function that intercepts the one standard loss in the module's step, or why it cannot."""
    recorder = _Intercept(None)
    with torch.no_grad(), recorder:
        output = call_step(module, name, batch)
    value = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(value, Tensor) or value.numel() != 1:
        return "returned no loss"
    if not recorder.calls:
        return "computes its loss without a standard loss of torch.nn.functional"
    rows = size_of(batch)
    fitting = [k for k, terms in enumerate(recorder.calls) if _explains(terms, value, rows)]
    if len(fitting) != 1:
        return f"returned {float(value):.6g}, which is the mean of none of its {len(recorder.calls)} standard losses"
    derived = _Derived(name, fitting[0])
    # the mean over rows must be the step's own loss on other rows too: weights and masks may differ from batch to batch
    part = cut(batch, torch.arange((rows + 1) // 2), rows)
    with torch.no_grad():
        whole, half = (float(derived(module, each).mean()) for each in (batch, part))
        expected = _scalar(call_step(module, name, part))
    if abs(whole - float(value)) > _allowed(float(value)) or abs(half - expected) > _allowed(expected):
        return "weighs its rows unequally (class weights, a mask, ignored targets)"
    return derived


def _scalar(output: Any) -> float:
    return float(output["loss"] if isinstance(output, Mapping) else output)


def _allowed(value: float) -> float:
    return _TOLERANCE * max(abs(value), 1e-6)


def _explains(found: _Terms, value: Tensor, rows: int) -> bool:
    if found.losses.dim() == 0 or found.losses.numel() % rows:
        return False
    return abs(float(found.of_rows(rows).float().sum(1).mean()) - float(value)) <= _allowed(float(value))


class _Terms:
    """Unreduced terms of a loss, and which of them count (None: all)."""

    def __init__(self, losses: Tensor, counted: Tensor | None) -> None:
        self.losses, self.counted = losses, counted

    def of_rows(self, rows: int) -> Tensor:
        """What each term adds to its row's mean over the terms that count [b, T]; the others are 0."""
        losses = self.losses.reshape(rows, -1)
        if self.counted is None:
            return losses / losses.shape[1]
        return losses / self.counted.reshape(rows, -1).sum(1, keepdim=True).clamp_min(1)


class _Derived(RowLosses):
    """The losses of the rows from the ``number``-th standard loss of the module's step, the rest of which is not run.

    What comes after the loss (metrics, logging) has no part in it, and often cannot run under ``vmap``.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number

    def terms(self, module: nn.Module, batch: Batch) -> Tensor:
        try:
            with _Intercept(self.number):
                call_step(module, self.name, batch)
        except _Found as found:
            return found.terms.of_rows(size_of(batch))
        raise InfluenceError(
            f"BIF: {self.name} did not reach its loss number {self.number + 1} on this batch; {REMEDY}."
        )


class _Found(BaseException):
    """Carries the terms out of the step; no ``except Exception`` of a user's step may swallow it."""

    def __init__(self, terms: _Terms) -> None:
        super().__init__()
        self.terms = terms


class _Intercept(TorchFunctionMode):
    """Asks standard losses for their unreduced terms.

    Args:
        stop_at: Number of the call at which the step is left with its terms; None keeps all calls and runs on.
    """

    def __init__(self, stop_at: int | None) -> None:
        super().__init__()
        self.stop_at, self.calls, self._count = stop_at, list[_Terms](), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _LOSSES:
            return func(*args, **kwargs)
        number, self._count = self._count, self._count + 1
        if self.stop_at is None or number == self.stop_at:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.arguments.update(reduction="none", **dict.fromkeys({"size_average", "reduce"} & {*bound.arguments}))
            terms = _Terms(func(*bound.args, **bound.kwargs), _counted(bound))
            if self.stop_at is not None:
                raise _Found(terms)
            self.calls.append(terms)
        return func(*args, **kwargs)


def _counted(bound: inspect.BoundArguments) -> Tensor | None:
    """Which terms count, where a loss of class indices may ignore some."""
    target = bound.arguments.get("target")
    if "ignore_index" not in bound.signature.parameters or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    ignored = bound.arguments.get("ignore_index", bound.signature.parameters["ignore_index"].default)
    return target.ne(ignored)
