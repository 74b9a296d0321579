"""The masks of dropout between the layers of a recurrent stack, read off its graph where each layer is a node of it.

That is so on a CPU, where one fused operation computes a layer and torch's own dropout comes between. cuDNN has dropout
inside of its kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ine_callback.capture.readable_nodes import is_readable

_LAYER = "MkldnnRnnLayerBackward0"
_BETWEEN = 4  # operations between a stack's output and its last layer (a transposition, both directions joined)


def masks_between(module: nn.RNNBase, output: Tensor) -> list[Tensor] | None:
    """What each layer's states [T, n, K] were multiplied by on their way to the next; None where that is not known."""
    found: list[Tensor] = []
    node = output.grad_fn
    for _ in range(module.num_layers - 1):
        layer = _layer_below(node)
        product: Any = None if layer is None else layer.next_functions[0][0]
        if product is None or product.name() != "MulBackward0" or not is_readable(product):
            return None
        node = product.next_functions[0][0]
        if product._saved_other is None or _layer_below(node) is None:
            return None
        found.append(product._saved_other.detach())
    return found[::-1]


def _layer_below(node: Any) -> Any:
    """The node of the first layer on the way down."""
    for _ in range(_BETWEEN):
        if node is None or node.name() == _LAYER:
            return node
        node = node.next_functions[0][0] if node.next_functions else None
    return None
