"""The check of bare parameters, before the first step: where are the rows in the operations that use them?

Shapes alone cannot tell: [b, T, D] and [T, b, D] may have one shape. So the loss is differentiated twice, and the second
time the batch's rows have changed places. Where the rows are, their gradients must have changed places with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ine_callback.capture.bare.layouts import RowLayout
from ine_callback.capture.bare.uses import Graph, Unrecognised, Use
from ine_callback.data.batches import cut
from ine_callback.distributed.sharding import is_sharded
from ine_callback.utilities.isolation import isolated

if TYPE_CHECKING:
    from ine_callback.capture.hooks import Capture

_PRODUCTS = 8  # random directions with which rows' gradients are compared
_TOLERANCE = 2e-2  # relative to the largest product, for rounding and half precision
_EVIDENT = 5  # times the tolerance: differences of rows that show whether they changed places

Kind = tuple[nn.Parameter, tuple[Any, ...]]
Found = dict[Kind, list[dict[RowLayout, Tensor]]]  # of each kind of use, use by use: products [b, 8] by layout


def find_layouts(
    module: nn.Module,
    capture: Capture,
    run: Callable[[nn.Module, Any], object],
    batch: Any,
    rows: int,
    unordered: set[nn.Module],
) -> None:
    """Finds the parameters whose rows' gradients can be read at their uses. Runs the model isolated, if there are any.

    Args:
        module: The model.
        capture: Its hooks; what is found is in ``capture.bare.layouts`` afterwards.
        run: Computes the loss of a batch.
        batch: A training batch, led by its rows.
        rows: Their number (at least 2).
        unordered: Layers to whose inputs the hooks find no rows; their parameters are looked for here.
    """
    if is_sharded(module):
        return
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    order = order.roll(1) if bool((order == torch.arange(rows)).all()) else order
    whole = _products(module, capture, run, batch, rows, unordered)
    other = _products(module, capture, run, cut(batch, order, rows), rows, unordered) if whole else {}
    found: dict[nn.Parameter, dict[tuple[Any, ...], RowLayout | None]] = {}
    for (parameter, kind), uses in whole.items():
        layout = _layout(uses, other.get((parameter, kind), []), order, alone=not unordered)
        found.setdefault(parameter, {})[kind] = layout
    for parameter, kinds in found.items():
        known = {kind: layout for kind, layout in kinds.items() if layout is not None}
        if len(known) == len(kinds):
            capture.bare.layouts[parameter] = known


def _layout(
    uses: list[dict[RowLayout, Tensor]], other: list[dict[RowLayout, Tensor]], order: Tensor, alone: bool
) -> RowLayout | None:
    """The one layout in which the rows' gradients changed places with the rows.

    Args:
        uses: Products of the rows' gradients in each layout, use by use.
        other: The same after the rows changed places.
        order: Which row came to each place.
        alone: Whether a layout is taken without evidence (all gradients are zero) if there is no other.
    """
    if len(uses) != len(other) or not all(a.keys() == b.keys() for a, b in zip(uses, other, strict=True)):
        return None
    right: list[RowLayout] = []
    evident: list[RowLayout] = []
    shared = [layout for layout in uses[0] if all(layout in use for use in uses)]
    for layout in shared:
        agrees, moves = True, False
        for before, after in ((a[layout], b[layout]) for a, b in zip(uses, other, strict=True)):
            near = _TOLERANCE * float(before.abs().max())
            agrees &= float((after - before[order.to(before.device)]).abs().max()) <= near
            moves |= float((after - before).abs().max()) > _EVIDENT * near
        right += [layout] * agrees
        evident += [layout] * (agrees and moves)
    chosen = evident or (right if alone and len(shared) == 1 else [])
    return chosen[0] if len(chosen) == 1 else None


def _products(
    module: nn.Module,
    capture: Capture,
    run: Callable[[nn.Module, Any], object],
    batch: Any,
    rows: int,
    unordered: set[nn.Module],
) -> Found:
    """Products of every row's gradient with random directions, for each use and each place where the rows may be."""
    called = set[str]()
    capture.on_call = lambda name, x: called.add(name)
    found: Found = {}
    try:
        with isolated(module):
            torch.manual_seed(0)
            loss = run(module, batch)
            layers = {child for child, name in capture.names.items() if name in called} - unordered
            wanted = capture.bare.open_to(layers)
            if not wanted or not isinstance(loss, Tensor) or loss.grad_fn is None:
                return {}
            uses = _uses(Graph(loss.grad_fn), wanted, rows)
            handles = [_measure(use, rows, found.setdefault((use.parameter, use.kind), [])) for use in uses]
            if uses:
                parameters = list(dict.fromkeys(use.parameter for use in uses))
                torch.autograd.grad(loss, parameters, allow_unused=True)
            for handle in handles:
                handle.remove()
    finally:
        capture.on_call = None
    return found


def _uses(graph: Graph, wanted: list[nn.Parameter], rows: int) -> list[Use]:
    """The uses of all parameters of which each use is recognised."""
    out: list[Use] = []
    for parameter in wanted:
        try:
            out += graph.uses(parameter, lambda use: bool(use.layouts(rows)))
        except Unrecognised:
            continue
    return out


def _measure(use: Use, rows: int, out: list[dict[RowLayout, Tensor]]) -> Any:
    """Has the products of one use put into a place of its own in ``out``, by layout; nothing where that fails."""
    products: dict[RowLayout, Tensor] = {}
    out.append(products)

    def hook(grads: tuple[Tensor | None, ...]) -> None:
        output_grads = grads[0]
        if output_grads is None:
            return
        with torch.no_grad(), torch.autocast(output_grads.device.type, enabled=False):
            for layout in use.layouts(rows):
                try:
                    sample = use.grad_sample(output_grads.detach(), layout, rows).wide()
                except (RuntimeError, Unrecognised):
                    continue
                dice = torch.Generator().manual_seed(0)
                directions = torch.randn(_PRODUCTS, *sample.layout, generator=dice, dtype=sample.dtype)
                products[layout] = sample.signals(directions.to(output_grads.device))

    return use.last.node.register_prehook(hook)
