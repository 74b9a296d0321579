"""The row-order check, before the first step: do each layer's inputs lead with the batch's rows, in their order?

If sizes happen to agree, shapes cannot distinguish rows from a time-first layout or a table of positions. So the model
is run on the whole batch, on all rows but the last, and with another row in the place of the last. Inputs of rows must
lose their last row, and keep all others. A model that draws random numbers draws others for a smaller batch; for it
only the third run shows what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.hooks import Capture
from ine_callback.capture.marks import MarkedCall, calls_below
from ine_callback.data.batches import cut, led_by
from ine_callback.utilities.isolation import isolated, random_state

VIEWS = "views of the rows behind one another"
LIKE = "rows do not lead what its like in a list of modules gets, so what looks like rows here need not be rows"


def row_order_faults(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any, rows: int
) -> tuple[dict[nn.Module, str], int]:
    """Modules whose inputs are not led by the batch's rows -> why; and how many views of the rows there are.

    Runs the model isolated and without gradient. Of several views that all layers get one after another, modules are
    named too: whoever does not count views leaves them out.

    Args:
        module: The model.
        capture: Its hooks.
        run: Computes the loss of a batch.
        batch: The first training batch. If no part of it has ``rows`` rows (batches of several loaders, side by
            side), only the layers' shapes are checked.
        rows: Its number of rows (at least 2).
    """
    whole, random, apart = inputs_of(module, capture, run, batch)
    by_name = {name: child for child, name in capture.names.items()}
    faults: dict[nn.Module, str] = {}
    if not led_by(batch, rows):
        for name, calls in whole.items():
            for x in calls:
                if x.dim() == 0 or x.shape[0] != rows:
                    faults[by_name[name]] = _not_led_by_rows(x, rows)
        return faults, 1
    places = torch.arange(rows)
    selected: set[nn.Module] = set()  # whose number of entries is not in proportion to the rows
    fewer, *_ = inputs_of(module, capture, run, cut(batch, places[:-1], rows))
    replaced, *_ = inputs_of(module, capture, run, cut(batch, places % (rows - 1), rows))
    leave_constants_out(apart, whole, fewer, replaced)
    for name, calls in whole.items():
        for x, less, other in zip(calls, fewer.get(name, []), replaced.get(name, []), strict=False):
            in_order = _loses_its_end(x, less, rows) and _same_rows(x, other, less)
            if in_order and (random or _same_rows(x, less, less)):
                continue
            if x.dim() and less.dim() and len(less) not in (len(x), len(x) * (rows - 1) / rows):
                selected.add(by_name[name])
            if _are_views(x, less, other, rows, random):
                views = f"its input of shape {tuple(x.shape)} holds {x.shape[0] // rows} {VIEWS}"
                faults[by_name[name]] = f"{views} (torch.cat), not each row's own one after another"
            else:
                faults[by_name[name]] = _not_led_by_rows(x, rows)
    count = views_of(faults, whole, rows)
    return faults | _like_them(selected, faults, module, capture.names), count


def _like_them(
    selected: Collection[nn.Module], faults: Mapping[nn.Module, str], module: nn.Module, names: Mapping[nn.Module, str]
) -> dict[nn.Module, str]:
    """Layers in the same place of another module of a list, where an index selects the entries: other experts.

    What they get in the first batch, if anything, may look like rows; in the next it need not.
    """
    alike = {like(module, names, one) for one in selected}
    return {child: LIKE for child in names if child not in faults and like(module, names, child) in alike}


def like(module: nn.Module, names: Mapping[nn.Module, str], child: nn.Module) -> tuple[Any, ...]:
    """What a layer has in common with its like in other modules of a list: place, class, and sizes of its weights."""
    shapes = [tuple(p.shape) for p in own_parameters(child).values()]
    return _place(module, names[child]), type(child), *shapes


def _place(module: nn.Module, name: str) -> str:
    """A module's name without the numbers of modules in lists; a name of its own for one in no list."""
    parts, above = [], module
    for part in name.split(".") if name else []:
        parts.append("*" if isinstance(above, nn.ModuleList) else part)
        above = above._modules[part]  # type: ignore[assignment]
    return ".".join(parts)


def views_of(faults: dict[nn.Module, str], whole: Mapping[str, Sequence[Tensor]], rows: int) -> int:
    """How many views of the rows all layers get, one after another, where nothing else is at fault; else 1.

    Args:
        faults: What :func:`row_order_faults` found.
        whole: The layers' inputs, call by call.
        rows: The batch's number of rows.
    """
    counts = {x.shape[0] // rows if x.dim() else 0 for calls in whole.values() for x in calls}
    alike = len(faults) == len(whole) and len(counts) == 1 and all(VIEWS in reason for reason in faults.values())
    return counts.pop() if alike and faults else 1


def _not_led_by_rows(x: Tensor, rows: int) -> str:
    return (
        f"its input of shape {tuple(x.shape)} is not led by the batch's {rows} rows (time first, shared by all rows, "
        "or several entries a row: nodes, packed tokens)"
    )


Inputs = dict[str, list[Tensor]]  # of every layer, call by call


def inputs_of(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any
) -> tuple[Inputs, bool, list[tuple[str, int]]]:
    """The inputs of every layer, whether the model drew random numbers, and which calls have no part in the loss."""
    inputs: Inputs = {}
    marked: dict[tuple[str, int], MarkedCall] = {}

    def observe(name: str, x: Tensor) -> None:
        calls = inputs.setdefault(name, [])
        if capture.marked is not None:
            marked[name, len(calls)] = capture.marked
        calls.append(x.detach().clone())

    capture.on_call = observe
    try:
        with isolated(module):  # with gradients, which adversarial examples need
            before = random_state(module)
            loss = run(module, batch)
            drew = before != random_state(module)
    finally:
        capture.on_call = None
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return inputs, drew, []
    parts = {id(call) for call in calls_below(loss.grad_fn)}
    return inputs, drew, [place for place, call in marked.items() if id(call) not in parts]


def leave_constants_out(apart: Sequence[tuple[str, int]], first: Inputs, *others: Inputs) -> None:
    """Removes inputs of calls without a part in the loss that do not depend on the batch.

    DoRA reads the norm of its weights by calling its layers with the identity.
    """
    for name, k in sorted(apart, key=lambda place: -place[1]):
        x, *rest = (run[name][k] if k < len(run.get(name, [])) else None for run in (first, *others))
        same = (y is not None and x is not None and x.shape == y.shape and torch.equal(x, y) for y in rest)
        if len(first[name]) > 1 and all(same):
            for run in (first, *others):
                del run[name][k]


def _loses_its_end(whole: Tensor, less: Tensor, rows: int) -> bool:
    if whole.dim() == 0 or less.dim() == 0:
        return False
    return whole.shape[0] % rows == 0 and less.shape[0] * rows == whole.shape[0] * (rows - 1)


def _are_views(whole: Tensor, less: Tensor, replaced: Tensor, rows: int, random: bool) -> bool:
    """Whether an input holds the batch several times, one after another: each copy then loses the last row."""
    if not _loses_its_end(whole, less, rows) or whole.shape[0] == rows or whole.shape[1:] != less.shape[1:]:
        return False
    others = replaced.unflatten(0, (-1, rows))[:, :-1] if random else less.unflatten(0, (-1, rows - 1))
    return all(_same_rows(a, b, b) for a, b in zip(whole.unflatten(0, (-1, rows))[:, :-1], others, strict=True))


def _same_rows(whole: Tensor, other: Tensor, less: Tensor) -> bool:
    """Whether two inputs agree in the rows that the smaller batch has."""
    a, b = whole[: less.shape[0]], other[: less.shape[0]]
    # other dimensions may depend on the batch (padding to its longest row): then values cannot be compared
    return a.shape != b.shape or same_values(a, b)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape agree, but for rounding."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.float().abs().max()) if a.numel() else 0.0
    return bool(((a - b).float().abs() <= 1e-2 * scale + 1e-6).all())
