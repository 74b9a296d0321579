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

from ine_callback.capture.row_losses import loss_node
from ine_callback.errors import InfluenceError

Cotangent = Callable[[Tensor], Tensor]
MAX_CLASSES = 64


def classes_of(loss: Tensor) -> int:
    """Number of classes of a loss: the backward passes that :func:`expect` needs.

    Raises:
        InfluenceError: If the loss is of another form, has several terms a row, or too many classes.
    """
    node = _known(loss)
    if node.name() == "NllLossBackward0":
        count = int(node._saved_self.shape[1])
        if count > MAX_CLASSES:
            raise InfluenceError(
                f"labels='expected': {count} classes need as many backward passes a batch, at most {MAX_CLASSES} are "
                "taken; use labels='sampled'."
            )
        return count
    raise InfluenceError(
        f"labels='expected': the loss {node.name()} has no list of labels to go through; use labels='sampled'."
    )


def sample(loss: Tensor, generator: torch.Generator | None = None) -> None:
    """Replaces the labels by ones drawn from the prediction, in the loss's backward pass.

    Cross entropy draws classes, binary cross entropy bits; a squared error (y - t)² is the negative log likelihood of a
    normal distribution with variance 1/2, and draws from it.

    Args:
        loss: A loss of cross entropy, NLL, MSE or binary cross entropy with logits.
        generator: Source of the random numbers; torch's own if None.

    Raises:
        InfluenceError: If the loss is of another form.
    """
    node = _known(loss)
    name = node.name()
    if name.startswith("NllLoss"):
        log_p = node._saved_self.detach()
        flat = log_p.movedim(1, -1).flatten(0, -2).float().exp()
        drawn = torch.multinomial(flat, 1, generator=generator).view(log_p.movedim(1, -1).shape[:-1])
        _replace(node, lambda grad: _moved(grad, drawn.unsqueeze(1)))
    elif name == "MseLossBackward0":
        value = node._saved_self.detach()
        noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)
        _replace(node, lambda _: noise * (2**0.5) * _coefficient(node, value))
    else:
        value = node._saved_self.detach()
        p = value.float().sigmoid()
        bits = torch.bernoulli(p, generator=generator)
        weight = 1.0 if node._saved_weight is None else node._saved_weight
        _replace(node, lambda _: ((p - bits).to(value.dtype) * weight) * _coefficient(node, value))


def expect(loss: Tensor, label: int) -> None:
    """Replaces all labels by one class, times the square root of its probability, in the loss's backward pass.

    The squares of all classes' gradients then add up to the expectation under the predicted distribution.
    """
    node = _known(loss)
    log_p = node._saved_self.detach()
    weight = (log_p[:, label] / 2).exp()

    def replaced(grad: Tensor) -> Tensor:
        column = torch.full((len(grad), 1), label, dtype=torch.int64, device=grad.device)
        moved: Tensor = _moved(grad, column) * weight[:, None]
        return moved

    _replace(node, replaced)


def _known(loss: Tensor) -> Any:
    node = loss_node(loss)
    if node is None:
        raise InfluenceError(
            "labels other than the data's need a loss of cross entropy, NLL, MSE or binary cross entropy with logits; "
            "this one is of another form: use labels='true'."
        )
    return node


def _moved(grad: Tensor, labels: Tensor) -> Tensor:
    """The gradient with respect to log p [n, C, ...] with the entry of each term's label moved to another label."""
    moved: Tensor = torch.zeros_like(grad).scatter(1, labels, grad.sum(1, keepdim=True))
    return moved


def _coefficient(node: Any, value: Tensor) -> Tensor | float:
    """The factor of one element's loss in the differentiated value, from the gradient that reaches the node."""
    found: Tensor = node.metadata["received"]
    return found / value.numel() if node._saved_reduction == 1 else found


def _replace(node: Any, cotangent: Cotangent) -> None:
    def remember(received: tuple[Tensor, ...]) -> None:
        node.metadata["received"] = received[0]

    def replaced(given: tuple[Any, ...], received: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(cotangent(grad) if k == 0 and grad is not None else grad for k, grad in enumerate(given))

    node.register_prehook(remember)
    node.register_hook(replaced)
