"""The check of selected entries, before the first step: do an expert's tokens belong to the rows that were traced?

The model is run isolated on the batch and on one whose rows have changed places. Each row's entries must be the same in
both, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.hooks import Capture
from ine_callback.capture.row_order import like, same_values
from ine_callback.utilities.isolation import isolated


@dataclass(frozen=True)
class Given:
    """A batch with its rows.

    Attributes:
        batch: The batch.
        rows: What identifies each row.
        entries: The rows of its entries, where rows do not lead.
    """

    batch: Any
    rows: Sequence[int]
    entries: EntryIndex | None = None


def find_routed(
    module: nn.Module,
    capture: Capture,
    loss: Callable[[nn.Module, Any], object],
    first: Given,
    then: Given,
    candidates: Collection[nn.Module],
) -> set[nn.Module]:
    """Which of some layers get entries that an index selected, whose rows can be traced; ``capture.routed`` has them.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks.
        loss: Computes the loss of a batch.
        first: A training batch.
        then: The same rows in another order.
        candidates: Layers whose inputs are not led by rows.
    """
    if not candidates:
        return set()
    before, after = (_selected(module, capture, loss, given, candidates) for given in (first, then))
    found = {one for one in candidates if _follow(before.get(one), after.get(one), first.rows, then.rows)}
    alike = {like(module, capture.names, one) for one in found}  # experts that got nothing in this batch, too
    capture.routed = {child for child in capture.names if like(module, capture.names, child) in alike}
    return capture.routed


Calls = list[tuple[Tensor, Tensor | None]]  # inputs, and the row of each entry


def _selected(
    module: nn.Module, capture: Capture, loss: Callable[[nn.Module, Any], object], given: Given, among: Collection[Any]
) -> dict[nn.Module, Calls]:
    found: dict[nn.Module, Calls] = {}
    by_name = {name: child for child, name in capture.names.items()}

    def observe(name: str, x: Tensor) -> None:
        if by_name[name] in among:
            found.setdefault(by_name[name], []).append((x.detach().clone(), capture.selected))

    entries, capture.rows, capture.entries = capture.entries, len(given.rows), given.entries
    capture.routed, capture.on_call = set(among), observe
    try:
        with isolated(module):
            torch.manual_seed(0)
            loss(module, given.batch)
    finally:
        capture.entries, capture.on_call, capture.routed = entries, None, set()
    return found


def _follow(before: Calls | None, after: Calls | None, first: Sequence[int], then: Sequence[int]) -> bool:
    """Whether each row has the same entries in both batches, in all calls, and not all rows have the same."""
    if not before or not after or len(before) != len(after):
        return False
    for (x, rows), (y, others) in zip(before, after, strict=True):
        if rows is None or others is None or len(rows) != len(x) or len(others) != len(y) or x.shape[1:] != y.shape[1:]:
            return False
        for k, row in enumerate(first):
            mine, theirs = _in_order(x[rows == k]), _in_order(y[others == then.index(row)])
            if len(mine) != len(theirs) or not same_values(mine, theirs):
                return False
    return True


def _in_order(x: Tensor) -> Tensor:
    """Entries in an order that does not depend on the one they came in."""
    flat = x.flatten(1).double()
    weights = torch.randn(flat.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x[(flat @ weights.to(flat.device)).argsort()]
