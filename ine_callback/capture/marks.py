"""Marks in the autograd graph where a recorded layer's call begins and ends; they hold no graph alive."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_CALL = "ine_callback.call"  # in the metadata of the node where a layer's output was made


def mark_call(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Marks the nodes of a layer's outputs with the layer and the nodes of its inputs."""
    begins = [x.grad_fn for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.grad_fn is not None]
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.metadata[_CALL] = module, begins


def call_of(node: Any) -> tuple[nn.Module, list[Any]] | None:
    """The layer that made its output there, with the nodes of its inputs; None if none did."""
    found: tuple[nn.Module, list[Any]] | None = node.metadata.get(_CALL)
    return found


def holds_call(node: Any) -> bool:
    """Whether a recorded layer was called somewhere in the graph below a node, and including it."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if _CALL in node.metadata:
            return True
        below = [one for one, _ in node.next_functions if one is not None and one not in seen]
        seen.update(below)
        waiting += below
    return False
