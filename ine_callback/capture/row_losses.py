"""Each row's loss, read from the autograd graph of the training loss: no patch, no second forward pass.

PyTorch's standard losses keep their input and target on the graph. They give every row's loss (a free baseline beside
every influence score) and the number of terms that the loss is a mean of (the scale of the curvature).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.capture.marks import holds_call
from ine_callback.capture.per_sample_gradients import sums_by_row

if TYPE_CHECKING:
    from ine_callback.capture.entries import EntryIndex

_NONE, _MEAN, _SUM = 0, 1, 2
_REDUCTIONS = {"none": _NONE, "mean": _MEAN, "sum": _SUM}
_SEARCH_DEPTH = 8
_SUMS = {"AddBackward0": 1, "SubBackward0": -1}  # the sign of what is added, or subtracted
_SAME = ("SumBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0", "AliasBackward0")


@dataclass(frozen=True)
class LossReading:
    """What the graph of a loss contains.

    Attributes:
        rows: Loss of every row [b], the mean over the row's terms.
        terms: Inverse of the coefficient with which a term enters the loss (rows or tokens for a mean), a scalar.
        scale: Inverse of the coefficient with which a row's loss enters the loss (the number of rows for a mean).
        own: The same for each row [b], whose terms may be more or heavier than others'; 0 for a row without terms.
        each: Loss of every term [b, T], such as a sequence's tokens; of entries whose rows an index tells [n, T].
        weights: Weight of every term in the mean or sum [b, T]; 0 for one that is ignored.
        labels: Class of every term [b, T], where terms have one.
    """

    rows: Tensor
    terms: Tensor
    scale: Tensor
    own: Tensor
    each: Tensor
    weights: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Scale:
    """How the batch's loss was scaled; set before its backward pass.

    Attributes:
        terms: Likelihood terms that the loss is a mean of (see :class:`LossReading`).
        rows: Inverse of the coefficient of a row's loss: its own gradient is ``rows`` times the row's contribution.
    """

    terms: Tensor | float
    rows: Tensor | float


@torch.no_grad()  # not detach(), which would drop derivatives of forward mode
def read_loss(loss: Tensor, rows: int, views: int = 1, entries: EntryIndex | None = None) -> LossReading | None:
    """Reads a loss made by cross entropy, NLL, MSE or binary cross entropy with logits, scaled by constants or masked.

    Penalties on weights that are added to it, in which no recorded layer was called, are passed by.

    Args:
        loss: The scalar to be differentiated.
        rows: Number of rows b of the batch.
        views: How many views of the rows the model sees, one after another; terms of all of them are a row's own.
        entries: The row of each entry, where rows do not lead: terms are the rows' own, or those of entries.

    Returns:
        The reading, or None where the loss is of another form (a sum of several, label smoothing, a custom one).

    Example:
        >>> import torch
        >>> logits = torch.zeros(4, 2, requires_grad=True)
        >>> loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0])) / 2
        >>> reading = read_loss(loss, rows=4)
        >>> reading.rows, reading.scale
        (tensor([0.6931, 0.6931, 0.6931, 0.6931]), tensor(8.))
    """
    coefficient: Tensor = wide(torch.ones_like(loss, requires_grad=False)).reshape(())  # also of a loss [1]
    mask: Tensor | None = None
    for node, index in way_to(loss):
        name = node.name()
        factor = _constant_factor(node, name)
        if name in _LOSSES:
            return _reading(node, mask, coefficient, rows, views, entries)
        if name in _SUMS:
            coefficient = coefficient * (_SUMS[name] * node._saved_alpha if index else 1)
        elif factor is not None and factor.dim() == 0:
            coefficient = coefficient / factor if name == "DivBackward0" else coefficient * factor
        elif factor is not None and mask is None and name == "MulBackward0":
            mask = factor  # a weight for each term: (losses * mask).sum() / mask.sum()
        elif name == "MeanBackward0":
            coefficient = coefficient / node._saved_self_sym_numel
        elif factor is not None:
            return None
    return None


def way_to(loss: Tensor) -> list[tuple[Any, int]]:
    """The nodes from a loss to the one of a known form in it, each with the input that leads on; empty if none does."""
    return _way(loss.grad_fn, _SEARCH_DEPTH) or []


def _way(node: Any, depth: int) -> list[tuple[Any, int]] | None:
    if node is None or not depth:
        return None
    name = node.name()
    if name in _LOSSES:
        return [(node, 0)]
    if name in _SUMS:  # a sum may have any number of terms: its depth does not count
        terms = [(k, below) for k, (below, _) in enumerate(node.next_functions) if below is not None]
        of_rows = [(k, below) for k, below in terms if len(terms) == 1 or holds_call(below)]
        way = _way(of_rows[0][1], depth) if len(of_rows) == 1 else None
        return None if way is None else [(node, of_rows[0][0]), *way]
    if name not in (*_SAME, "MeanBackward0") and _constant_factor(node, name) is None:
        return None
    index, below = next(((k, one) for k, (one, _) in enumerate(node.next_functions) if one is not None), (0, None))
    way = _way(below, depth - 1)
    return None if way is None else [(node, index), *way]


def _constant_factor(node: Any, name: str) -> Tensor | None:
    """The constant in a product or quotient; autograd saves it only if the other side needs a gradient."""
    if name == "DivBackward0" and node._saved_self is None:
        return node._saved_other  # type: ignore[no-any-return]
    if name == "MulBackward0" and (node._saved_self is None) != (node._saved_other is None):
        return node._saved_other if node._saved_self is None else node._saved_self  # type: ignore[no-any-return]
    return None


def _reading(
    node: Any, mask: Tensor | None, coefficient: Tensor, rows: int, views: int, entries: EntryIndex | None
) -> LossReading | None:
    """Makes the reading from a loss's node, the weights of its terms [n], ordered by rows, and its coefficient."""
    losses, weights = _LOSSES[node.name()](node)
    labels = node._saved_target if node.name().startswith("NllLoss") else None
    return _assembled(losses, weights, labels, node._saved_reduction, mask, coefficient, rows, views, entries)


def reading_of(
    losses: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    reduction: str,
    gradient: Tensor,
    rows: int,
    views: int = 1,
) -> LossReading | None:
    """The reading of a loss whose terms are known, without its graph.

    Args:
        losses: Loss of every term [n], ordered by rows.
        weights: Weight of every term [n].
        labels: Class of every term [n].
        reduction: Of the terms: "mean" (by their weights), "sum" or "none".
        gradient: Of the loss that is differentiated, with respect to the reduced value, or to every term.
        rows: Number of rows b.
        views: How many views of the rows the model sees.

    Returns:
        The reading, or None where terms do not divide into rows.

    Example:
        >>> import torch
        >>> reading = reading_of(torch.tensor([1.0, 3.0]), torch.ones(2), None, "mean", torch.tensor(0.5), rows=2)
        >>> reading.rows, reading.scale
        (tensor([1., 3.]), tensor(4.))
    """
    coefficient, mask = wide(gradient), None
    if reduction == "none":  # the heaviest term has weight 1, as where terms are masked
        largest = coefficient.abs().amax()
        coefficient, mask = largest, coefficient.flatten() / torch.where(largest > 0, largest, 1.0)
    return _assembled(losses, weights, labels, _REDUCTIONS[reduction], mask, coefficient, rows, views, None)


def _assembled(
    losses: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    reduction: int,
    mask: Tensor | None,
    coefficient: Tensor,
    rows: int,
    views: int,
    entries: EntryIndex | None,
) -> LossReading | None:
    """Makes the reading of terms [n]; ``mask``: weights of unreduced ones."""
    if mask is not None and (reduction != _NONE or mask.numel() != losses.numel()):
        return None
    index = None
    if entries is not None and len(losses) != rows:
        found = entries.find(losses.shape)
        if found is None:
            return None
        index = found[0]
    elif losses.numel() % rows:
        return None
    views = views if losses.numel() % (rows * views) == 0 else 1

    def by_row(x: Tensor) -> Tensor:
        if index is not None:
            return x.reshape(index.numel(), -1)
        if views == 1:
            return x.reshape(rows, -1)
        return x.reshape(views, rows, -1).transpose(0, 1).reshape(rows, -1)

    losses, weights = by_row(losses), by_row(weights)
    if mask is not None:
        weights = weights * by_row(mask)
    if reduction == _MEAN:
        coefficient = coefficient / weights.sum()
    total, weighted = weights.sum(1), (losses * weights).sum(1)
    if index is not None:
        total, weighted = (sums_by_row(x, index, rows) for x in (total, weighted))
    row_losses = weighted / total.clamp_min(1e-12)
    own = torch.where(total > 0, (coefficient * total).reciprocal(), 0.0)
    scale = rows / (coefficient * weights.sum())
    labels = None if labels is None else by_row(labels)
    return LossReading(row_losses, coefficient.reciprocal(), scale, own, losses, weights, labels)


def _nll(node: Any) -> tuple[Tensor, Tensor]:
    target, log_p = node._saved_target, node._saved_self
    ignored = target == signed(node._saved_ignore_index)
    safe = target.masked_fill(ignored, 0)
    losses = -wide(log_p).gather(1, safe.unsqueeze(1)).squeeze(1)
    weights = torch.ones_like(losses) if node._saved_weight is None else node._saved_weight[safe].to(losses.dtype)
    return losses, weights.masked_fill(ignored, 0.0)


def wide(x: Tensor) -> Tensor:
    """float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def signed(index: int) -> int:
    """The ignored index, which the graph has as an unsigned 64-bit integer."""
    return index - (1 << 64) if index >= (1 << 63) else index


def _mse(node: Any) -> tuple[Tensor, Tensor]:
    losses = (wide(node._saved_self) - wide(node._saved_target)).square()
    return losses, torch.ones_like(losses)


def _bce(node: Any) -> tuple[Tensor, Tensor]:
    losses = F.binary_cross_entropy_with_logits(
        wide(node._saved_self),
        wide(node._saved_target),
        pos_weight=node._saved_pos_weight,
        reduction="none",
    )
    weight = node._saved_weight
    # the reduction divides by the number of elements, not by the sum of weights
    return losses if weight is None else losses * weight, torch.ones_like(losses)


_LOSSES = {
    "NllLossBackward0": _nll,
    "NllLoss2DBackward0": _nll,
    "MseLossBackward0": _mse,
    "BinaryCrossEntropyWithLogitsBackward0": _bce,
}


def loss_node(loss: Tensor) -> Any:
    """The node of the graph where a loss of a known form, scaled by constants or masked, takes prediction and target.

    None for another form, such as a sum of several of them.
    """
    way = way_to(loss)
    return way[-1][0] if way else None


def silence_others(loss: Tensor) -> None:
    """In the coming backward pass, penalties that are added to the loss of a known form have no gradient."""
    for node, index in way_to(loss):
        if node.name() in _SUMS:
            node.register_hook(lambda given, _, index=index: tuple(_only(index, given)))


def _only(index: int, gradients: tuple[Any, ...]) -> Iterator[Any]:
    for k, grad in enumerate(gradients):
        yield grad if k == index or grad is None else torch.zeros_like(grad)


class RowLosses:
    """Each row's training loss, averaged over its observations: a free baseline beside every score.

    Args:
        rows: Number of rows N.
        device: Where the run is.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, rows, device=device)

    def add(self, rows: Tensor, losses: Tensor) -> None:
        """Adds the losses [b] of rows; NaN: unknown."""
        known = ~losses.isnan()
        self._sums.index_add_(1, rows, torch.stack([losses.where(known, 0.0), known]).to(self._sums.dtype))

    def grow(self, rows: int) -> None:
        """Enlarges the state to ``rows`` rows."""
        self._sums = F.pad(self._sums, (0, rows - self._sums.shape[1]))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = state["sums"].to(self._sums, copy=True)

    def total(self) -> Tensor:
        """Sum over all observations, a scalar on the device."""
        return self._sums[0].sum()

    def mean(self) -> NDArray[np.float64]:
        """Mean loss [N], NaN for rows without a known loss."""
        total, count = self._sums.cpu().double().numpy()
        mean: NDArray[np.float64] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return mean
