"""The check of entries, before the first step: does a layer's input hold each row's entries where the index says so?

The model is run isolated on the batch and on one whose texts or graphs have changed places. Each row's entries must be
the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.bare.entry_check import find_entry_uses
from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.errors import LayerError
from ine_callback.capture.hooks import Capture
from ine_callback.capture.layer_functions_check import layer_function_faults
from ine_callback.capture.routed_check import Given, find_routed
from ine_callback.capture.row_order import inputs_of, leave_constants_out, same_values
from ine_callback.data.batches import cut, holds_graphs, led_by
from ine_callback.data.row_entries import RowEntries, row_entries

Loss = Callable[[nn.Module, Any], object]
_UNCHECKED = "the order of entries inside the layers was not checked"


def entry_faults(
    module: nn.Module, capture: Capture, loss: Loss, batch: Any, rows: int, rows_of: Callable[[Any], Any] | None
) -> tuple[dict[nn.Module, str], list[str]]:
    """Modules whose inputs are led neither by rows nor by their entries in order -> why; what was not checked.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks, with the entries of the batch.
        loss: Computes the loss of a batch.
        batch: A training batch.
        rows: Its number of rows.
        rows_of: What gave the batch's rows and entries, asked again for the exchanged batch.
    """
    assert capture.entries is not None
    try:
        whole, _, apart = inputs_of(module, capture, loss, batch)
        by_name = {name: child for child, name in capture.names.items()}
        moved = _exchanged(batch, rows_of)
        calls_then, random, _ = ({}, False, []) if moved is None else inputs_of(module, capture, loss, moved[1][0])
        leave_constants_out(apart, whole, calls_then)
        faults = {by_name[n]: why for n, calls in whole.items() if (why := _shape_fault(capture.entries, calls))}
        capture.bare.trusts_entries = moved is None
        if moved is None:
            faults |= layer_function_faults(module, capture, loss, batch, rows)
            return faults, [f"{_UNCHECKED} (the batch cannot be cut by row_fn's entries)"]
        (_, at_first), (_, then) = moved
        if random:
            return faults, [f"{_UNCHECKED} (the model draws random numbers)"]
        device = next(module.parameters()).device
        first, second = (_given(*one, device) for one in moved)
        routed = find_routed(module, capture, loss, first, second, faults)
        faults = {one: why for one, why in faults.items() if one not in routed}
        for name, calls in whole.items():
            pairs = zip(calls, calls_then.get(name, []), strict=False)
            seen = by_name[name] in faults or by_name[name] in capture.routed
            if not seen and not all(_follow(x, at_first, y, then) for x, y in pairs):
                faults[by_name[name]] = "its input does not hold each row's entries where row_fn says so"
        faults |= layer_function_faults(module, capture, loss, batch, rows)
        find_entry_uses(module, capture, loss, first, second, faults)
    except Exception as error:  # of the user's code, run on another batch
        return {}, [f"{_UNCHECKED} ({type(error).__name__}: {error})"]
    return faults, []


def _shape_fault(entries: EntryIndex, calls: list[Tensor]) -> str:
    for x in calls:
        try:
            entries.of(x.shape)
        except LayerError as error:
            return str(error)
    return ""


def _given(batch: Any, entries: RowEntries, device: torch.device) -> Given:
    rows = torch.as_tensor(entries.rows).tolist()
    return Given(batch, rows, EntryIndex(entries, len(rows), device, ""))


def _exchanged(
    batch: Any, rows_of: Callable[[Any], Any] | None
) -> tuple[tuple[Any, RowEntries], tuple[Any, RowEntries]] | None:
    """The batch, and the same in another order, each with its entries; None if it cannot be cut."""
    given = None if rows_of is None else row_entries(rows_of(batch))
    if given is None or rows_of is None:
        return None
    packed = [shape[0] for shape in given.sizes() if len(shape) > 1]
    # of nodes beside one another, only their own class knows how to move them with their graph
    for size in [len(given.rows)] * holds_graphs(batch) + packed:
        if size > 1 and led_by(batch, size):
            other = cut(batch, torch.arange(size).roll(1), size)
            then = row_entries(rows_of(other))
            if then is not None:
                return (batch, given), (other, then)
    return None


def _follow(x: Tensor, first: RowEntries, y: Tensor, then: RowEntries) -> bool:
    """Whether each row has the same entries in two batches' inputs."""
    before, after = _by_row(x, first), _by_row(y, then)
    return before.keys() == after.keys() and all(
        before[row].shape == after[row].shape and same_values(before[row], after[row]) for row in before
    )


def _by_row(x: Tensor, entries: RowEntries) -> dict[int, Tensor]:
    """The entries of each row, by its dataset index."""
    rows = torch.as_tensor(entries.rows).tolist()
    index, dims = EntryIndex(entries, len(rows), x.device, "").of(x.shape)
    x = x.flatten(0, dims - 1) if dims > 1 else x
    index = torch.arange(len(rows), device=x.device) if index is None else index
    return {row: x[index == k] for k, row in enumerate(rows)}
