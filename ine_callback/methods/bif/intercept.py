"""Standard losses asked for their unreduced terms, while a module's own step runs."""

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


class Terms:
    """The terms of one loss call.

    Attributes:
        losses: Unreduced, of any shape, in float32 or better.
        reduction: What the call asked for.
        kept: Mask by which the step picked the places that have a term, before the loss; None: all have one.
    """

    def __init__(self, losses: Tensor, mass: Tensor | None, reduction: str, kept: Tensor | None) -> None:
        self.losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        self._mass = mass
        self.reduction, self.kept = reduction, kept

    @property
    def mass(self) -> Tensor:
        """What each term counts in the call's own mean: 0 where its target is ignored, a class's weight, else 1."""
        assert self._mass is not None, "the step was left at its terms"
        return self._mass.to(self.losses.dtype)

    def reduced(self) -> Tensor:
        """What the call returns, as a function of ``losses``."""
        if self.reduction == "none":
            return self.losses
        total = self.losses.sum()
        if self.reduction == "sum":
            return total
        return total / (len(self.losses) if self.reduction == "batchmean" else self.mass.sum())

    def laid_out(self, values: Tensor, rows: int, last: bool) -> Tensor | None:
        """Values of the terms as [rows, T], places without a term 0; None where they cannot be told apart.

        Args:
            values: One for each term, in the shape of ``losses``.
            rows: Number of rows.
            last: Whether rows are the last dimension, as where time comes first.
        """
        if self.kept is not None:
            places = self.kept.flatten().nonzero()[:, 0]
            values = values.new_zeros(self.kept.numel()).index_copy(0, places, values.flatten())
        if (values.dim() == 0 and rows > 1) or not values.numel() or values.numel() % rows:
            return None
        return values.reshape(-1, rows).T if last else values.reshape(rows, -1)


class Found(BaseException):
    """Carries the terms out of the step; no ``except Exception`` of a user's step may swallow it."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = terms


class Intercept(TorchFunctionMode):
    """Asks standard losses for their terms.

    Args:
        stop_at: Number of the call at which the step is left with its terms (:class:`Found`). None: the step runs on
            with losses that depend on their terms alone, each a leaf of the graph, and all calls are kept.

    Attributes:
        calls: The calls, where the step runs on.
        odd: Whether a call returned anything but what its terms say.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.calls, self.odd = list[Terms](), False
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
            raise Found(self._terms(func, args, kwargs, weigh=False))
        return func(*args, **kwargs)

    def _replaced(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        terms = self._terms(func, args, kwargs, weigh=True)
        torch.set_grad_enabled(True)  # until the caller's own ``no_grad`` ends: what follows is told by this leaf
        terms.losses = terms.losses.detach().requires_grad_()
        self.calls.append(terms)
        out, true = terms.reduced(), func(*args, **kwargs)
        near = 1e-4 if true.dtype in (torch.float32, torch.float64) else 1e-2
        self.odd |= out.shape != true.shape or not torch.allclose(out.to(true.dtype), true, near, equal_nan=True)
        return out

    def _terms(self, func: Any, args: Any, kwargs: Any, weigh: bool) -> Terms:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        old = (asked.pop("size_average", None), asked.pop("reduce", None))
        reduction = asked["reduction"] if old == (None, None) else legacy_get_string(*old, emit_warning=False)
        losses = func(**asked | {"reduction": "none"})
        mass = _mass(func, asked, losses, reduction) if weigh else None
        return Terms(losses, mass, reduction, self._kept(losses))

    def _kept(self, losses: Tensor) -> Tensor | None:
        """The mask that left as many places as there are terms, if one was used to pick them."""
        return next((m for m in reversed(self._masks) if m.dim() and int(m.sum()) == losses.numel() < m.numel()), None)


def _mass(func: Any, asked: dict[str, Any], losses: Tensor, reduction: str) -> Tensor:
    """What each term counts; a loss of class indices may ignore some and weigh the classes."""
    target, weight = asked.get("target"), asked.get("weight")
    # the mean of a binary loss divides by all terms, whatever their weights; a sum of it is divided by the user
    if weight is not None and (func in _WEIGHTED_MEANS or (func in _BINARY and reduction != "mean")):
        return torch.as_tensor(weight).expand_as(losses)
    if "ignore_index" not in asked or not isinstance(target, Tensor) or target.is_floating_point():
        return torch.ones_like(losses)
    counted = target.ne(asked["ignore_index"])
    mass: Tensor = counted if weight is None else weight[target.masked_fill(~counted, 0)] * counted
    return mass.reshape(losses.shape)
