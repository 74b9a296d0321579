"""Each row's margin, read from the autograd graph of the training loss: what the model says against the row's label.

The margin is ``log p(label) - log p(likeliest other class)`` at the moment of the visit, before the step: below 0 the
model disagrees with the label. It exists for a cross entropy with one label a row, and for a binary one.

A row's margins are averaged in windows of its visits: the first, the second, 3-4, 5-8 and so on, each twice as long as
the one before. Early windows know little; in late ones a network may have learnt wrong labels by heart. Which of them
says most is decided at the end (:mod:`ine_callback.applications.label_errors`), and the state does not grow with the
run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.capture.row_losses import loss_node, signed, wide
from ine_callback.scores import WINDOWS

LIMIT = 10.0  # greater margins count as this: certain is certain


def read_margins(loss: Tensor, rows: int) -> Tensor | None:
    """Margins [b] of a batch's rows, cut to -10 ... 10; NaN for a row without a label.

    Args:
        loss: The scalar to be differentiated.
        rows: Number of rows b of the batch.

    Returns:
        The margins, or None where the loss has no one label a row: a regression, tokens, several labels, another form.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], requires_grad=True)
        >>> read_margins(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])), rows=2)
        tensor([ 1., -3.])
    """
    node = loss_node(loss)
    if node is None:
        return None
    if node.name() == "NllLossBackward0":
        margins = _of_classes(node, rows)
    elif node.name() == "BinaryCrossEntropyWithLogitsBackward0":
        margins = _of_bits(node, rows)
    else:
        return None
    return None if margins is None else margins.clamp(-LIMIT, LIMIT)


def _of_classes(node: Any, rows: int) -> Tensor | None:
    log_p, target = wide(node._saved_self.detach()), node._saved_target.detach()
    if log_p.dim() != 2 or len(log_p) != rows or log_p.shape[1] < 2:
        return None
    ignored = target == signed(node._saved_ignore_index)
    label = target.masked_fill(ignored, 0).unsqueeze(1)
    others = log_p.scatter(1, label, -torch.inf).amax(1)
    return (log_p.gather(1, label).squeeze(1) - others).masked_fill(ignored, torch.nan)


def _of_bits(node: Any, rows: int) -> Tensor | None:
    logits, target = wide(node._saved_self.detach()), wide(node._saved_target.detach())
    if logits.numel() != rows:
        return None
    margins, target = (logits * (2 * target - 1)).reshape(rows), target.reshape(rows)
    return margins.masked_fill((target != 0) & (target != 1), torch.nan)


class RowMargins:
    """Sums of every row's margins in each window of its visits.

    Args:
        rows: Number of rows N.
        device: Where the run is.

    Example:
        >>> import torch
        >>> margins = RowMargins(2, torch.device("cpu"))
        >>> for value in (-1.0, 2.0, 3.0, 5.0):
        ...     margins.add(torch.tensor([1]), torch.tensor([value]))
        >>> margins.means()[:, :4]
        array([[nan, nan, nan, nan],
               [-1.,  2.,  4., nan]])
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, WINDOWS, rows, device=device)  # of margins, of visits
        self._ends = (2.0 ** torch.arange(WINDOWS - 1, device=device))[:, None]  # visits until each window is full

    def add(self, rows: Tensor, margins: Tensor) -> None:
        """Adds the margins [b] of one visit to rows; NaN: unknown."""
        if not rows.numel():
            return
        known = ~margins.isnan()
        window = (self._sums[1][:, rows].sum(0) >= self._ends).sum(0)
        place = window * self._sums.shape[2] + rows
        added = torch.stack([margins.where(known, 0.0), known]).to(self._sums.dtype)
        self._sums.view(2, -1).index_add_(1, place, added)

    def grow(self, rows: int) -> None:
        """Enlarges the state to ``rows`` rows."""
        self._sums = F.pad(self._sums, (0, rows - self._sums.shape[2]))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = state["sums"].to(self._sums, copy=True)

    def means(self) -> NDArray[np.float64] | None:
        """Mean margin in each window [N, 8], NaN where there was no visit; None where no margin was known at all."""
        total, count = self._sums.cpu().double().numpy()
        if not count.any():
            return None
        mean: NDArray[np.float64] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return np.ascontiguousarray(mean.T)
