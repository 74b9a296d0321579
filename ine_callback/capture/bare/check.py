"""The check of bare parameters, before the first step: where are the rows in the operations that use them?

Shapes alone cannot tell: [b, T, D] and [T, b, D] may have one shape. So the loss is differentiated twice, and the
second time the batch's rows have changed places. Where the rows are, their gradients must have changed places with
them. Where two places are left, another row takes the place of the last, and the others' gradients must stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.bare.graph import Graph
from ine_callback.capture.bare.layouts import RowLayout
from ine_callback.capture.bare.parameters import BareParameters
from ine_callback.capture.bare.pullback import Unrecognised
from ine_callback.capture.bare.uses import Use
from ine_callback.capture.hooks import Capture
from ine_callback.capture.layers.recurrent import drops_between_layers
from ine_callback.data.batches import cut
from ine_callback.distributed.sharding import is_sharded
from ine_callback.utilities.isolation import isolated

_PRODUCTS = 8  # random directions with which rows' gradients are compared
_TOLERANCE = {True: 2e-2, False: 1e-3}  # relative to the largest product, where half precision takes part and where not
_LARGEST = 1 << 26  # elements of one parameter's gradients that are formed for the rows of a batch
_TOO_LARGE = "computing another weight, and gradients of {} rows would take {:.1f} GB"
_ROUNDS = 3  # of looking for uses further up
_ZERO = 0.02  # standard deviation of what replaces weights that are all zero, whose neighbours get no gradient
_EVIDENT = 5  # times the tolerance: differences of rows that show whether they changed places

Kind = tuple[nn.Parameter, tuple[Any, ...]]
Uses = list[dict[RowLayout, Tensor]]  # of each use, by layout: products [b, 8]
Found = dict[Kind, Uses]
Sizes = tuple[tuple[int, ...], ...]


def find_layouts(
    module: nn.Module,
    capture: Capture,
    run: Callable[[nn.Module, Any], object],
    batch: Any,
    rows: int,
    unread: set[nn.Module],
    only: Collection[nn.Parameter] | None = None,
) -> None:
    """Finds the parameters whose rows' gradients can be read at their uses. Runs the model isolated, if there are any.

    Of recorded layers' parameters, the uses outside of the layers' own calls.

    Args:
        module: The model.
        capture: Its hooks; what is found is in ``capture.bare.layouts`` afterwards.
        run: Computes the loss of a batch.
        batch: A training batch, led by its rows.
        rows: Their number (at least 2).
        unread: Layers that the hooks cannot record; their parameters are looked for here.
        only: Parameters to which uses are added; None: all.
    """
    if is_sharded(module):
        return
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    order = order.roll(1) if bool((order == torch.arange(rows)).all()) else order
    places = torch.arange(rows)
    run_on = partial(_products, module, capture, run, rows=rows, unread=unread, only=only)
    found, capture.bare.rejected, first = dict[Kind, list[RowLayout]](), set(), set[Kind]()
    for _ in range(_ROUNDS):
        whole, half, recorded, sizes, computed = run_on(batch)
        moved, *_ = run_on(cut(batch, order, rows)) if whole else ({},)
        compare = _Comparison(_TOLERANCE[half], order, alone=not unread)
        found = {use: compare.that_moved(uses, moved.get(use, [])) for use, uses in whole.items()}
        if any(len(layouts) > 1 for layouts in found.values()):
            replaced, *_ = run_on(cut(batch, places % (rows - 1), rows))
            for use, layouts in found.items():
                if len(layouts) > 1:
                    found[use] = compare.that_stayed(layouts, whole[use], replaced.get(use, []))
        first = first or set(whole)
        wrong = {use for use, layouts in found.items() if len(layouts) != 1}
        if not wrong:
            break
        capture.bare.rejected |= wrong  # a weight that is as large as the batch is no row's: further up there may be
    suspects = {use: sizes[use] for use in found if use not in first or use in computed}
    growing = _growing(module, capture, run, cut(batch, places[:-1], rows), unread, suspects) if suspects else set()
    for parameter in {parameter for parameter, _ in found} - growing:
        known = {kind: layouts for (p, kind), layouts in found.items() if p is parameter}
        if all(len(layouts) == 1 for layouts in known.values()):
            before = capture.bare.layouts.get(parameter, {})
            new = {kind: layouts[0] for kind, layouts in known.items()}
            if all(before.get(kind, layout) == layout for kind, layout in new.items()):
                capture.bare.layouts[parameter] = {**before, **new}
    beside = set(capture.bare.layouts).difference(capture.bare.open_to(recorded))
    capture.bare.beside = beside if only is None else capture.bare.beside.difference(only) | beside.intersection(only)


@dataclass
class _Comparison:
    """Compares the rows' gradients of two runs.

    Attributes:
        tolerance: Of a difference, relative to the largest product.
        order: Which row came to each place in the second run.
        alone: Whether a layout is taken without evidence (all gradients are zero) if there is no other.
    """

    tolerance: float
    order: Tensor
    alone: bool

    def that_moved(self, uses: Uses, moved: Uses) -> list[RowLayout]:
        """The layouts in which the rows' gradients changed places with the rows, in all uses."""
        right, evident = [], []
        shared = _shared(uses, moved)
        for layout in shared:
            agrees, moves = True, False
            for before, after in _pairs(layout, uses, moved):
                near = self.tolerance * float(before.abs().max())
                agrees &= float((after - before[self.order.to(before.device)]).abs().max()) <= near
                moves |= float((after - before).abs().max()) > _EVIDENT * near
            right += [layout] * agrees
            evident += [layout] * (agrees and moves)
        return evident or (right if self.alone and len(shared) == 1 else [])

    def that_stayed(self, layouts: list[RowLayout], uses: Uses, replaced: Uses) -> list[RowLayout]:
        """The layouts in which only the last row's gradient changed when another row took its place.

        A row's gradient may also change places in a wrong layout, which adds the sum of all rows to each.
        """
        return [
            layout
            for layout in set(layouts).intersection(_shared(uses, replaced))
            if all(
                float((after - before)[:-1].abs().max()) <= self.tolerance * float(before.abs().max())
                for before, after in _pairs(layout, uses, replaced)
            )
        ]


def _shared(uses: Uses, other: Uses) -> list[RowLayout]:
    """The layouts that all uses have, in both runs."""
    if len(uses) != len(other):
        return []
    return [layout for layout in uses[0] if all(layout in use for use in (*uses, *other))]


def _pairs(layout: RowLayout, uses: Uses, other: Uses) -> Iterator[tuple[Tensor, Tensor]]:
    return ((a[layout], b[layout]) for a, b in zip(uses, other, strict=True))


def _products(
    module: nn.Module,
    capture: Capture,
    run: Callable[[nn.Module, Any], object],
    batch: Any,
    rows: int,
    unread: set[nn.Module],
    only: Collection[nn.Parameter] | None,
) -> tuple[Found, bool, set[nn.Module], dict[Kind, list[Sizes]], set[Kind]]:
    """Products of every row's gradient with random directions, for each use and each place where the rows may be.

    Returns:
        The products, whether half precision took part, the layers whose calls are recorded; the sizes of what each use
        has computed from the parameter before, and which uses compute something.
    """
    found: Found = {}
    sizes: dict[Kind, list[Sizes]] = {}
    computes = set[Kind]()
    with _graph(module, capture, run, batch, unread) as (graph, loss, layers):
        wanted = [p for p in capture.bare.trainable() if only is None or p in only]
        if not wanted or graph is None:
            return {}, False, layers, {}, set()
        uses = _uses(graph, capture.bare, wanted, rows)
        handles = [_measure(use, rows, found.setdefault((use.parameter, use.kind), [])) for use in uses]
        for use in uses:
            sizes.setdefault((use.parameter, use.kind), []).append(use.sizes)
            computes |= {(use.parameter, use.kind)} if use.computes else set()
        if uses:
            parameters = list(dict.fromkeys(use.parameter for use in uses))
            torch.autograd.grad(loss, parameters, allow_unused=True)
        for handle in handles:
            handle.remove()
    return found, graph.half, layers, sizes, computes


@contextlib.contextmanager
def _graph(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any, unread: set[nn.Module]
) -> Iterator[tuple[Graph | None, Any, set[nn.Module]]]:
    """The graph of a batch's loss, None if there is none; the loss; the layers whose calls are recorded."""
    called = set[str]()
    capture.on_call = lambda name, x: called.add(name)
    try:
        with isolated(module):
            torch.manual_seed(0)
            _fill_zeros(capture.bare.trainable())
            loss = run(module, batch)
            layers = {child for child, name in capture.names.items() if name in called} - unread
            layers = {child for child in layers if not drops_between_layers(child)}
            if isinstance(loss, Tensor) and loss.grad_fn is not None:
                yield Graph(loss.grad_fn, unread=set(capture.names) - layers), loss, layers
            else:
                yield None, loss, layers
    finally:
        capture.on_call = None


def _growing(
    module: nn.Module,
    capture: Capture,
    run: Callable[[nn.Module, Any], object],
    fewer: Any,
    unread: set[nn.Module],
    uses: dict[Kind, list[Sizes]],
) -> set[nn.Parameter]:
    """Parameters whose uses come after rows had a part in what was computed from them: it is larger for more rows.

    A row's contribution is that of its own use of a parameter. Behind an operation that compares rows it would be
    another one, with the same sum.
    """
    found: dict[Kind, list[Sizes]] = {}
    with _graph(module, capture, run, fewer, unread) as (graph, *_):
        for parameter in {parameter for parameter, _ in uses}:
            if graph is None:
                break
            with contextlib.suppress(Unrecognised):
                for use in graph.above(parameter, lambda use: (use.parameter, use.kind) in uses).uses:
                    found.setdefault((parameter, use.kind), []).append(use.sizes)
    growing = {use[0] for use, sizes in uses.items() if found.get(use) != sizes}
    capture.bare.unknown.update(dict.fromkeys(growing, "an operation on rows, behind which no row has its own part"))
    return growing


def _uses(graph: Graph, bare: BareParameters, wanted: list[nn.Parameter], rows: int) -> list[Use]:
    """The uses of all parameters; operations that are apart may belong to no row."""
    out: list[Use] = []
    for parameter in wanted:
        try:
            above = graph.above(parameter, lambda use: bare.may_end(use, rows))
            largest = max((use.takes(rows) for use in above.uses), default=0)
            if largest > _LARGEST:
                bare.unknown[parameter] = _TOO_LARGE.format(rows, largest / 2**28)
                continue
            out += above.uses
            bare.apart[parameter] = {one.kind for one in above.apart}
            bare.unknown[parameter] = above.apart[0].name if above.apart else ""
        except Unrecognised as error:
            bare.unknown[parameter] = str(error)
    return out


def _fill_zeros(parameters: list[nn.Parameter]) -> None:
    """Some numbers for weights that begin as zero (LoRA's): they show where the rows are; isolation undoes it."""
    with torch.no_grad():
        for p in parameters:
            if type(p) is nn.Parameter and not p.any():
                p.normal_(0, _ZERO)


def _measure(use: Use, rows: int, out: Uses) -> Any:
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
                except Exception:  # of a formula that cannot be batched, or of an operation that is not what it seems
                    continue
                dice = torch.Generator().manual_seed(0)
                directions = torch.randn(_PRODUCTS, *sample.layout, generator=dice, dtype=sample.dtype)
                products[layout] = sample.signals(directions.to(output_grads.device))

    return use.last.node.register_prehook(hook)
