"""Marks in the autograd graph where a recorded layer's call begins and ends; they hold no graph alive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_CALL = "ine_callback.call"  # in the metadata of the node where a layer's output was made


@dataclass(frozen=True)
class MarkedCall:
    """A recorded layer's call, as the graph tells it.

    Attributes:
        module: The layer.
        begins: The nodes of its inputs.
        rows: The row of each of its entries, where these were selected by an index; None: rows lead.
    """

    module: nn.Module
    begins: list[Any]
    rows: Tensor | None


def mark_call(module: nn.Module, inputs: Any, outputs: Any, rows: Tensor | None = None) -> MarkedCall:
    """Marks the nodes of a layer's outputs."""
    begins = [x.grad_fn for x in _leaves(inputs) if isinstance(x, Tensor) and x.grad_fn is not None]
    call = MarkedCall(module, begins, rows)
    for output in _leaves(outputs):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            metadata: Any = output.grad_fn.metadata
            metadata[_CALL] = call
    return call


def _leaves(found: Any) -> list[Any]:
    return [found] if isinstance(found, Tensor) else tree_leaves(found)


def call_of(node: Any) -> MarkedCall | None:
    """The call that made its output there; None if none did."""
    found: MarkedCall | None = node.metadata.get(_CALL)
    return found


def calls_below(node: Any) -> Iterator[MarkedCall]:
    """The calls of recorded layers in the graph below a node, and including it."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if _CALL in node.metadata:
            yield node.metadata[_CALL]
        below = [one for one, _ in node.next_functions if one is not None and one not in seen]
        seen.update(below)
        waiting += below


def holds_call(node: Any) -> bool:
    """Whether a recorded layer was called somewhere in the graph below a node, and including it."""
    return any(True for _ in calls_below(node))
