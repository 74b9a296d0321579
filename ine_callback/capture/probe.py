"""Whether the leading dimension of each layer's input really is the batch's rows, in the batch's order.

Shapes cannot tell a time-first layout or a position table from rows when the sizes happen to agree. The batch is run
once with all its rows and once without the last: the inputs of true rows stay as they were and lose their end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.batches import cut
from ine_callback.capture.hooks import Capture
from ine_callback.isolation import isolated


def row_order_faults(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any, rows: int
) -> dict[nn.Module, str]:
    """Modules whose inputs are not led by the batch's rows -> why. Runs the model twice, isolated and without gradient.

    Args:
        module: The model.
        capture: Its hooks.
        run: Computes the loss of a batch.
        batch: The first training batch.
        rows: Its number of rows (at least 2).
    """
    whole = _inputs(module, capture, run, batch)
    less = _inputs(module, capture, run, cut(batch, torch.arange(rows - 1), rows))
    by_name = {name: child for child, name in capture.names.items()}
    faults = {}
    for name, calls in whole.items():
        for a, b in zip(calls, less.get(name, []), strict=False):
            if not _same_rows(a, b, rows):
                faults[by_name[name]] = (
                    f"its input of shape {tuple(a.shape)} is not led by the batch's {rows} rows (time first, or shared "
                    "by all rows)"
                )
    return faults


def _inputs(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any
) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}
    capture.observe_call = lambda name, a: seen.setdefault(name, []).append(a.detach().clone())
    try:
        with isolated(module), torch.no_grad():
            run(module, batch)
    finally:
        capture.observe_call = None
    return seen


def _same_rows(whole: Tensor, less: Tensor, rows: int) -> bool:
    if whole.dim() == 0 or whole.shape[0] % rows or less.shape[0] * rows != whole.shape[0] * (rows - 1):
        return False
    kept = whole[: less.shape[0]]
    if kept.shape != less.shape:
        return True  # other dimensions follow the batch (padding to its longest row): only the lead can be compared
    if not kept.is_floating_point():
        return torch.equal(kept, less)
    scale = float(kept.float().abs().max()) if kept.numel() else 0.0
    return bool(((kept - less).float().abs() <= 1e-2 * scale + 1e-6).all())
