"""The check of bare parameters where rows do not lead: do the uses' outputs hold each row's entries in their places?"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.bare.graph import Graph
from ine_callback.capture.bare.layouts import RowLayout
from ine_callback.capture.bare.parameters import leading_entries, of_use
from ine_callback.capture.bare.pullback import Unrecognised
from ine_callback.capture.bare.uses import Use
from ine_callback.capture.hooks import Capture
from ine_callback.capture.routed_check import Given
from ine_callback.utilities.isolation import isolated

_PRODUCTS = 8  # random directions with which rows' gradients are compared
_TOLERANCE = 1e-2  # of a difference, relative to the largest product
Found = dict[nn.Parameter, list[tuple[tuple[Any, ...], RowLayout, Tensor]]]  # kind of use, layout, products [b, 8]


def find_entry_uses(
    module: nn.Module,
    capture: Capture,
    loss: Callable[[nn.Module, Any], object],
    first: Given,
    then: Given,
    unread: Collection[nn.Module],
) -> None:
    """Finds the parameters whose uses hold entries, or rows; ``capture.bare.layouts`` has them.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks.
        loss: Computes the loss of a batch.
        first: A training batch.
        then: The same rows in another order.
        unread: Layers whose calls are not recorded.
    """
    before, after = (_products(module, capture, loss, given, unread) for given in (first, then))
    places = torch.tensor([then.rows.index(row) for row in first.rows])
    for p, uses in before.items():
        others = after.get(p, [])
        if len(uses) == len(others) and all(
            _alike(x, y[places]) for (*_, x), (*_, y) in zip(uses, others, strict=True)
        ):
            capture.bare.layouts[p] = {kind: layout for kind, layout, _ in uses}


def _alike(x: Tensor, y: Tensor) -> bool:
    return float((x - y).abs().max()) <= _TOLERANCE * float(x.abs().max())


def _products(
    module: nn.Module, capture: Capture, loss: Callable[[nn.Module, Any], object], given: Given, unread: Collection[Any]
) -> Found:
    """Products of every row's gradient with random directions, for each use."""
    entries, found, handles = given.entries, Found(), []
    assert entries is not None
    before, capture.entries, capture.rows = capture.entries, entries, len(given.rows)
    try:
        with isolated(module), capture.paused():
            torch.manual_seed(0)
            value = loss(module, given.batch)
            if not isinstance(value, Tensor) or value.grad_fn is None:
                return {}
            graph, parameters = Graph(value.grad_fn, unread=unread), capture.bare.trainable()
            for p in parameters:
                try:
                    above = graph.above(p, lambda use: leading_entries(use, entries) is not None)
                except Unrecognised:
                    continue
                if above.apart and not capture.bare.called(p, unread):  # of its uses some are not known
                    continue
                for use in above.uses:
                    handles.append(_measure(use, leading_entries(use, entries), given, found.setdefault(p, [])))
            torch.autograd.grad(value, parameters, allow_unused=True)
    finally:
        capture.entries = before
        for handle in handles:
            handle.remove()
    return found


def _measure(use: Use, layout: RowLayout | None, given: Given, out: list[Any]) -> Any:
    def hook(grads: tuple[Tensor | None, ...]) -> None:
        if grads[0] is None or layout is None or given.entries is None:
            return
        with torch.no_grad(), torch.autocast(grads[0].device.type, enabled=False):
            sample = of_use(use, grads[0].detach(), layout, given.entries).wide()
            dice = torch.Generator().manual_seed(0)
            directions = torch.randn(_PRODUCTS, *sample.layout, generator=dice, dtype=sample.dtype)
            out.append((use.kind, layout, sample.signals(directions.to(grads[0].device))))

    return use.last.node.register_prehook(hook)
