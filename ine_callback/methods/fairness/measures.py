"""What is reported along the path: loss, accuracy, parity gap, equalised odds; weighted and differentiable.

A gap between groups is the greatest over their pairs: of numbers |mean difference|, of class probabilities the total
variation ½ Σ_c |mean difference|, for two classes the difference of the mean probability of either. The signs and the
pair are held fixed in derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELL_ROWS = 10  # of a group within a class, for equalised odds


def loss(outputs: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error of outputs [n, 1] for numbers [n], or cross entropy of logits [n, C] for one-hot classes."""
    if target.dim() == 1:
        return weights @ (target - outputs[:, 0]).square()
    return -(weights @ (outputs.log_softmax(1) * target).sum(1))


def accuracy(outputs: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Share of right classes, or for numbers the share of variance explained. Who is right is held fixed."""
    if target.dim() == 1:
        return 1 - loss(outputs, target, weights) / (weights @ (target - weights @ target).square())
    return weights @ (outputs.detach().argmax(1) == target.argmax(1)).to(weights.dtype)


def scores(outputs: Tensor) -> Tensor:
    """Class probabilities [n, C] of logits, or the predicted numbers [n, 1]."""
    return outputs.softmax(1) if outputs.shape[1] > 1 else outputs


def gap(predicted: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Demographic parity gap of predictions [n, C] between one-hot groups [n, G].

    Example:
        >>> w = torch.full((4,), 0.25)
        >>> gap(torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]]), torch.eye(2)[[0, 0, 1, 1]], w)
        tensor(0.5000)
    """
    each = groups * weights[:, None]
    means = each.T @ predicted / each.sum(0)[:, None]
    apart = means[:, None] - means[None]
    a, b = divmod(int(apart.detach().abs().sum(2).argmax()), len(means))
    found = apart[a, b]
    signs = torch.where(found.detach() >= 0, 1.0, -1.0).to(found.dtype)
    return (found * signs).sum() / (2 if len(found) > 1 else 1)


def equalised_odds(predicted: Tensor, groups: Tensor, slices: Tensor, weights: Tensor) -> Tensor:
    """The greatest gap within a class, or a slice, of the target; NaN where no class has two groups of 10 rows.

    Args:
        predicted: [n, C].
        groups: One-hot [n, G].
        slices: Classes or slices of the target, one-hot [n, H].
        weights: [n].
    """
    found = []
    for column in slices.T:
        known = (groups * column[:, None]).sum(0) >= CELL_ROWS
        if int(known.sum()) > 1:
            found.append(gap(predicted, groups[:, known], weights * column))
    if not found:
        return weights.new_tensor(float("nan"))
    return found[int(torch.stack([each.detach() for each in found]).argmax())]
