"""Terms of a loss that belong to no row: which operations on parameters have gradients that no row changes?

A penalty on weights (L2, L1, towards earlier weights, orthogonality) is added to the mean over rows. What it gives a
parameter is measured where the parameter enters it, for the given batch and for one in which copies of half of the rows
have taken the places of the others. If that is the same, the term is no row's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.bare.graph import Apart, Graph
from ine_callback.capture.bare.parameters import BareParameters
from ine_callback.capture.bare.pullback import Unrecognised
from ine_callback.capture.hooks import Capture
from ine_callback.data.batches import cut, led_by
from ine_callback.distributed.sharding import is_sharded

_TOLERANCE = 1e-4  # relative; the same operations on the same weights
_WATCHED = "ine_callback.watched"  # in the metadata of a node: by whom, and which of its inputs
Step = Callable[[nn.Module, Any], object]
Kind = tuple[object, ...]  # of an operation, see :class:`~.Apart`
KindsByParameter = Mapping[nn.Parameter, set[Kind]]
Gradients = dict[nn.Parameter, dict[Kind, Tensor]]


class ApartGradients:
    """Sums of the gradients that parameters get in the coming backward pass through operations that are apart."""

    def __init__(self) -> None:
        self.found: Gradients = {}
        self._handles: list[Any] = []

    def watch(self, parameter: nn.Parameter, apart: Apart) -> None:
        """Reads the gradient of one operation; once, however often it is asked for."""
        kinds, first = self.found.setdefault(parameter, {}), apart.first

        def hook(given: tuple[Tensor | None, ...], _: tuple[Tensor, ...]) -> None:
            grad = given[first.index]
            if grad is not None:
                grad = grad.detach().to_dense() if grad.is_sparse else grad.detach()
                kinds[apart.kind] = kinds[apart.kind] + grad if apart.kind in kinds else grad.clone()

        watched = first.node.metadata.setdefault(_WATCHED, set())  # there, so that nothing here holds a graph
        if (id(self), first.index) not in watched:
            watched.add((id(self), first.index))
            self._handles.append(first.node.register_hook(hook))

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def find_terms_of_no_row(
    module: nn.Module, capture: Capture, run: Step, batch: Any, rows: int, running: Callable[[nn.Module], Any]
) -> None:
    """Finds the operations on parameters that belong to no row. Runs the model isolated, in pairs.

    Args:
        module: The model.
        capture: Its hooks; what is found is in ``capture.bare.of_no_row`` afterwards.
        run: Computes the loss of a batch.
        batch: A training batch.
        rows: Its number of rows; of a single one nothing can be found out.
        running: Makes the context in which the model runs, with the same random numbers each time.
    """
    if is_sharded(module) or rows < 2 or not led_by(batch, rows):
        return
    whole = _gradients(module, capture, run, batch, rows, running)
    if not whole:
        return
    others = _gradients(module, capture, run, cut(batch, torch.arange(rows) % (rows // 2), rows), rows, running)
    for parameter, kinds in whole.items():
        for kind, gradient in kinds.items():
            other, size = others.get(parameter, {}).get(kind), float(gradient.abs().max())
            if other is not None and size and float((gradient - other).abs().max()) <= _TOLERANCE * size:
                capture.bare.of_no_row.setdefault(parameter, set()).add(kind)


def _gradients(
    module: nn.Module, capture: Capture, run: Step, batch: Any, rows: int, running: Callable[[nn.Module], Any]
) -> Gradients:
    found = ApartGradients()
    with running(module), capture.paused():
        loss = run(module, batch)
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            return {}
        graph, parameters = Graph(loss.grad_fn), capture.bare.trainable()
        for parameter in parameters:
            for apart in _apart(graph, parameter, capture.bare, rows):
                found.watch(parameter, apart)
        if found.found:
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return found.found


def _apart(graph: Graph, parameter: nn.Parameter, bare: BareParameters, rows: int) -> list[Apart]:
    try:
        return graph.above(parameter, lambda use: bare.may_end(use, rows)).apart
    except Unrecognised:  # it shares an operation with a use
        return []


def gradients_without(
    of_no_row: KindsByParameter, loss: Tensor, parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """Gradients of a loss of one row, or of a batch, without what belongs to no row; dense, None where there is none.

    Args:
        of_no_row: Of each parameter, the kinds of operations that belong to no row.
        loss: The loss.
        parameters: The parameters to differentiate by.
    """
    found = ApartGradients()
    if any(p in of_no_row for p in parameters) and loss.grad_fn is not None:
        graph = Graph(loss.grad_fn)
        for p in [p for p in parameters if p in of_no_row]:
            for apart in graph.above(p, lambda use: False).apart:
                if apart.kind in of_no_row[p]:
                    found.watch(p, apart)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found.close()
    out: list[Tensor | None] = []
    for p, grad in zip(parameters, grads, strict=True):
        dense = grad.to_dense() if grad is not None and grad.is_sparse else grad
        for part in found.found.get(p, {}).values():
            dense = None if dense is None else dense - part
        out.append(dense)
    return out
