"""Gradients for other labels than the data's, from one forward pass: the backward step of the loss is replaced.

A Fisher information needs gradients of ``-log p(y | x)`` with labels y drawn from the model's prediction, or with all
labels, weighted by their probabilities. Only the gradient that the loss gives the prediction depends on the label. So a
hook on the loss's node of the autograd graph replaces that gradient, and the user's training step is used unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.row_losses import loss_node, silence_others, wide
from ine_callback.errors import InfluenceError

Cotangent = Callable[[Tensor], Tensor]
MAX_CLASSES = 64


def labels_of(loss: Tensor, rows: int) -> int:
    """Passes that :func:`expect` needs to cover a loss's labels: its classes, or the numbers that it predicts.

    Args:
        loss: The scalar that is about to be differentiated.
        rows: Number of rows of the batch.

    Raises:
        InfluenceError: If the loss is of another form, has several terms a row, or too many classes.
    """
    node, side = _known(loss)
    classes = node.name().startswith("NllLoss")
    value = node._saved_target if side else node._saved_self
    if classes and (node.name() != "NllLossBackward0" or len(value) != rows):
        raise InfluenceError(
            f"labels='expected': the loss {node.name()} with several terms a row has no list of labels to go through; "
            "use labels='sampled'."
        )
    count = int(value.shape[1] if classes else value.numel() // rows)
    if count > MAX_CLASSES:
        raise InfluenceError(
            f"labels='expected': {count} {'classes' if classes else 'predicted numbers'} need as many backward passes "
            f"a batch, at most {MAX_CLASSES} are taken; use labels='sampled'."
        )
    return count


def sample(loss: Tensor, generator: torch.Generator | None = None) -> None:
    """Replaces the labels by ones drawn from the prediction, in the loss's backward pass; weights of labels stay.

    Cross entropy draws classes, binary cross entropy bits; a squared error (y - t)² is the negative log likelihood of a
    normal distribution with variance 1/2, and draws from it.

    Args:
        loss: A loss of cross entropy, NLL, MSE or binary cross entropy with logits.
        generator: Source of the random numbers; torch's own if None.

    Raises:
        InfluenceError: If the loss is of another form.
    """
    node, side = _known(loss)
    silence_others(loss)
    name = node.name()
    value = (node._saved_target if side else node._saved_self).detach()
    if name.startswith("NllLoss"):
        classes_last = wide(value).exp().movedim(1, -1)
        drawn = torch.multinomial(classes_last.flatten(0, -2), 1, generator=generator).view(classes_last.shape[:-1])
        _replace(node, side, lambda grad: _moved(grad, drawn.unsqueeze(1)))
    elif name == "MseLossBackward0":
        noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)
        _replace(node, side, lambda _: noise * (2**0.5) * _coefficient(node, value))
    else:
        p = wide(value).sigmoid()
        bits = torch.bernoulli(p, generator=generator)
        weight = _bce_weight(node, p)
        _replace(node, side, lambda _: ((p - bits) * weight).to(value.dtype) * _coefficient(node, value))


def expect(loss: Tensor, label: int, rows: int) -> None:
    """Replaces all labels by one class, times the square root of its probability, in the loss's backward pass.

    The squares of all classes' gradients then add up to the expectation under the predicted distribution. A row keeps
    its own label's weight. Of numbers and bits, one predicted value has an error of the size of its standard deviation
    under that distribution, and the others have none. :func:`labels_of` tells whether the loss can.

    Args:
        loss: The scalar that is about to be differentiated.
        label: Which class, or which of a row's predicted values.
        rows: Number of rows of the batch.
    """
    node, side = _known(loss)
    silence_others(loss)
    value = (node._saved_target if side else node._saved_self).detach()
    if node.name() == "NllLossBackward0":
        root = (wide(value)[:, label] / 2).exp()

        def replaced(grad: Tensor) -> Tensor:
            column = torch.full((len(grad), 1), label, dtype=torch.int64, device=grad.device)
            moved: Tensor = _moved(grad, column) * root[:, None].to(grad.dtype)
            return moved

        return _replace(node, side, replaced)
    only = torch.zeros_like(value).view(rows, -1)
    only[:, label] = 1.0
    error = torch.full_like(value, 2**0.5)
    if node.name() != "MseLossBackward0":
        p = wide(value).sigmoid()
        error = ((p * (1 - p)).sqrt() * _bce_weight(node, p)).to(value.dtype)
    _replace(node, side, lambda _: only.view_as(value) * error * _coefficient(node, value))


def probabilities(loss: Tensor, rows: int) -> Tensor:
    """Predicted probabilities of the classes [b, C].

    Raises:
        InfluenceError: If the loss is no cross entropy with one term a row.
    """
    node = loss_node(loss)
    if node is None or node.name() != "NllLossBackward0" or len(node._saved_self) != rows:
        raise InfluenceError(
            "the loss has no classes with one term a row: sampler='logit', 'distance' and 'topk' need a classifier; "
            "use sampler='curvature'."
        )
    return wide(node._saved_self.detach()).exp()


def _known(loss: Tensor) -> tuple[Any, int]:
    """The loss's node, and which of its inputs is the prediction: a squared error takes them either way round."""
    node = loss_node(loss)
    sides = [] if node is None else [k for k, (function, _) in enumerate(node.next_functions) if function is not None]
    if len(sides) != 1 or (sides[0] and node.name() != "MseLossBackward0"):
        raise InfluenceError(
            "labels other than the data's need a loss of cross entropy, NLL, MSE or binary cross entropy with logits, "
            "without label smoothing, other terms beside it, or labels that have a gradient; this one is of another "
            "form: use labels='true'."
        )
    return node, sides[0]


def _moved(grad: Tensor, labels: Tensor) -> Tensor:
    """The gradient with respect to log p [n, C, ...] with the entry of each term's label moved to another label."""
    moved: Tensor = torch.zeros_like(grad).scatter(1, labels, grad.sum(1, keepdim=True))
    return moved


def _bce_weight(node: Any, like: Tensor) -> Tensor:
    """Weight of each element's own label."""
    weight = torch.ones_like(like) if node._saved_weight is None else wide(node._saved_weight)
    positive = node._saved_pos_weight
    return weight if positive is None else weight * (1 + (wide(positive) - 1) * wide(node._saved_target.detach()))


def _coefficient(node: Any, value: Tensor) -> Tensor:
    """How much an element's loss counts in what is differentiated, from the gradient that reaches the node."""
    found: Tensor = node.metadata["received"]
    return found / value.numel() if node._saved_reduction == 1 else found


def _replace(node: Any, side: int, cotangent: Cotangent) -> None:
    def remember(received: tuple[Tensor, ...]) -> None:
        node.metadata["received"] = received[0]

    def replaced(given: tuple[Any, ...], received: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(cotangent(grad) if k == side else grad for k, grad in enumerate(given))

    node.register_prehook(remember)
    node.register_hook(replaced)
