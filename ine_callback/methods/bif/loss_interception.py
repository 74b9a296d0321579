"""Intercepts standard losses while a module's step runs, to get their unreduced terms."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode

_LOSSES = frozenset(
    getattr(F, name)
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
)
_WEIGHTED_MEANS = frozenset({F.mse_loss, F.l1_loss, F.huber_loss})  # their mean divides by the sum of ``weight``
_BINARY = frozenset({F.binary_cross_entropy, F.binary_cross_entropy_with_logits})


class LossTerms:
    """The terms of one call of a standard loss.

    Attributes:
        losses: Unreduced, of any shape, in float32 or better.
        reduction: The reduction of the call.
        mask: Mask by which the step selected, before the loss, the places that have a term; None: all have one.
    """

    def __init__(self, losses: Tensor, weights: Tensor | None, reduction: str, mask: Tensor | None) -> None:
        self.losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        self._weights = weights
        self.reduction, self.mask = reduction, mask

    @property
    def weights(self) -> Tensor:
        """Weight of each term in the call's mean: 0 where its target is ignored, its class's weight, else 1."""
        assert self._weights is not None, "the weights of a call that ends the step are not computed"
        return self._weights.to(self.losses.dtype)

    def reduced(self) -> Tensor:
        """The value of the call, as a function of ``losses``."""
        if self.reduction == "none":
            return self.losses
        total = self.losses.sum()
        if self.reduction == "sum":
            return total
        return total / (len(self.losses) if self.reduction == "batchmean" else self.weights.sum())

    def laid_out(self, values: Tensor, rows: int, last: bool) -> Tensor | None:
        """Values of the terms as [rows, T], 0 in places without a term; None where their number does not fit.

        Args:
            values: One for each term, in the shape of ``losses``.
            rows: Number of rows.
            last: Whether rows are the last dimension, for instance where time comes first.
        """
        if self.mask is not None:
            places = self.mask.flatten().nonzero()[:, 0]
            values = values.new_zeros(self.mask.numel()).index_copy(0, places, values.flatten())
        if (values.dim() == 0 and rows > 1) or not values.numel() or values.numel() % rows:
            return None
        return values.reshape(-1, rows).T if last else values.reshape(rows, -1)


class TermsFound(BaseException):
    """Ends the step and carries the terms out of it. An ``except Exception`` in a user's step does not catch it."""

    def __init__(self, terms: LossTerms) -> None:
        super().__init__()
        self.terms = terms


class InterceptLosses(TorchFunctionMode):
    """Intercepts the calls of standard losses.

    Args:
        stop_at: Number of the call at which the step ends (:class:`TermsFound`). None: the step runs to its end with
            losses whose terms are leaves of the graph.

    Attributes:
        calls: The terms of all calls, where the step runs to its end.
        mismatch: Whether a call's value was not that of its terms.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.calls, self.mismatch = list[LossTerms](), False
        self._stop_at, self._count, self._masks = stop_at, 0, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            self._masks.append(args[1])
        if func not in _LOSSES:
            return func(*args, **kwargs)
        number, self._count = self._count, self._count + 1
        if self._stop_at is None:
            return self._replaced(func, args, kwargs)
        if number == self._stop_at:
            raise TermsFound(self._terms(func, args, kwargs, weigh=False))
        return func(*args, **kwargs)

    def _replaced(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        terms = self._terms(func, args, kwargs, weigh=True)
        torch.set_grad_enabled(
            True
        )  # until the caller's ``no_grad`` ends, so that the rest of the step is differentiated
        terms.losses = terms.losses.detach().requires_grad_()
        self.calls.append(terms)
        out, true = terms.reduced(), func(*args, **kwargs)
        tolerance = 1e-4 if true.dtype in (torch.float32, torch.float64) else 1e-2
        same = out.shape == true.shape and torch.allclose(out.to(true.dtype), true, tolerance, equal_nan=True)
        self.mismatch |= not same
        return out

    def _terms(self, func: Any, args: Any, kwargs: Any, weigh: bool) -> LossTerms:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        old = (arguments.pop("size_average", None), arguments.pop("reduce", None))
        reduction = arguments["reduction"] if old == (None, None) else legacy_get_string(*old, emit_warning=False)
        losses = func(**arguments | {"reduction": "none"})
        weights = _term_weights(func, arguments, losses, reduction) if weigh else None
        return LossTerms(losses, weights, reduction, self._mask_of(losses))

    def _mask_of(self, losses: Tensor) -> Tensor | None:
        """The last mask that selected as many places as there are terms, if there is one."""
        return next((m for m in reversed(self._masks) if m.dim() and int(m.sum()) == losses.numel() < m.numel()), None)


def _term_weights(func: Any, arguments: dict[str, Any], losses: Tensor, reduction: str) -> Tensor:
    """Weight of each term in the mean; a loss of class indices may ignore targets and weight classes."""
    target, weight = arguments.get("target"), arguments.get("weight")
    # the mean of a binary loss divides by the number of terms, whatever their weights; a sum is divided by the user
    if weight is not None and (func in _WEIGHTED_MEANS or (func in _BINARY and reduction != "mean")):
        return torch.as_tensor(weight).expand_as(losses)
    if "ignore_index" not in arguments or not isinstance(target, Tensor) or target.is_floating_point():
        return torch.ones_like(losses)
    counted = target.ne(arguments["ignore_index"])
    weights: Tensor = counted if weight is None else weight[target.masked_fill(~counted, 0)] * counted
    return weights.reshape(losses.shape)
