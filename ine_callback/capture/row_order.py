"""Whether the leading dimension of each layer's input really is the batch's rows, in the batch's order.

Shapes cannot tell a time-first layout or a position table from rows when the sizes happen to agree. The batch is run
with all its rows, without the last, and with another row in the place of the last: the inputs of true rows lose their
end, and the other rows' stay as they were. A model that draws random numbers draws others for a smaller batch, so there
only the third run tells what stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.hooks import Capture
from ine_callback.capture.row_mixing import mixture_faults
from ine_callback.data.batches import cut, led_by
from ine_callback.utilities.isolation import isolated

VIEWS = "views of the rows behind one another"


def row_order_faults(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any, rows: int
) -> dict[nn.Module, str]:
    """Modules whose inputs are not led by the batch's rows -> why. Runs the model isolated and without gradient.

    Args:
        module: The model.
        capture: Its hooks.
        run: Computes the loss of a batch.
        batch: The first training batch; where no part of it has ``rows`` rows (several loaders' batches side by side),
            only the layers' shapes are looked at.
        rows: Its number of rows (at least 2).
    """
    whole, random = _inputs(module, capture, run, batch)
    if led_by(batch, rows):
        places = torch.arange(rows)
        less, _ = _inputs(module, capture, run, cut(batch, places[:-1], rows))
        other, _ = _inputs(module, capture, run, cut(batch, places % (rows - 1), rows))
    by_name = {name: child for child, name in capture.names.items()}
    faults = {}
    for name, calls in whole.items():
        for k, a in enumerate(calls):
            if not led_by(batch, rows):
                good = a.dim() > 0 and a.shape[0] == rows
            elif k < min(len(less.get(name, [])), len(other.get(name, []))):
                b, c = less[name][k], other[name][k]
                good = _loses_its_end(a, b, rows) and _same_before(a, c, b) and (random or _same_before(a, b, b))
            else:
                continue
            if not good:
                views = led_by(batch, rows) and k < len(less.get(name, [])) and _views(a, less[name][k], rows)
                shape = f"its input of shape {tuple(a.shape)}"
                faults[by_name[name]] = (
                    f"{shape} holds {a.shape[0] // rows} {VIEWS} (torch.cat), not each row's own one after another"
                    if views
                    else f"{shape} is not led by the batch's {rows} rows (time first, shared by all rows, or several "
                    "entries a row: nodes, packed tokens)"
                )
    if led_by(batch, rows):
        faults = {**mixture_faults(module, capture, run, batch, rows), **faults}
    return faults


def _inputs(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any
) -> tuple[dict[str, list[Tensor]], bool]:
    """The inputs of every layer, and whether the model drew random numbers."""
    seen: dict[str, list[Tensor]] = {}
    capture.on_call = lambda name, a: seen.setdefault(name, []).append(a.detach().clone())
    try:
        with isolated(module):  # with gradients: adversarial examples take some
            before = _random_states(module)
            run(module, batch)
            drew = any(not torch.equal(a, b) for a, b in zip(before, _random_states(module), strict=True))
    finally:
        capture.on_call = None
    return seen, drew


def _random_states(module: nn.Module) -> list[Tensor]:
    device = next(module.parameters()).device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _loses_its_end(whole: Tensor, less: Tensor, rows: int) -> bool:
    if whole.dim() == 0 or less.dim() == 0:
        return False
    return whole.shape[0] % rows == 0 and less.shape[0] * rows == whole.shape[0] * (rows - 1)


def _views(whole: Tensor, less: Tensor, rows: int) -> bool:
    """Whether the batch is there several times, one after another: without its last row each time loses its end."""
    if not _loses_its_end(whole, less, rows) or whole.shape[0] == rows or whole.shape[1:] != less.shape[1:]:
        return False
    one, other = whole.unflatten(0, (-1, rows))[:, :-1], less.unflatten(0, (-1, rows - 1))
    return all(_same_before(a, b, b) for a, b in zip(one, other, strict=True))


def _same_before(whole: Tensor, other: Tensor, less: Tensor) -> bool:
    """Whether two inputs agree in the rows that the smaller batch has."""
    a, b = whole[: less.shape[0]], other[: less.shape[0]]
    if a.shape != b.shape:
        return True  # other dimensions follow the batch (padding to its longest row): only the lead can be compared
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.float().abs().max()) if a.numel() else 0.0
    return bool(((a - b).float().abs() <= 1e-2 * scale + 1e-6).all())
