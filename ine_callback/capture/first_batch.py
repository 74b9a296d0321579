"""All checks of the first batch, before the first step: which layers cannot be recorded row by row, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.bare.check import find_layouts
from ine_callback.capture.bare.no_row import find_terms_of_no_row
from ine_callback.capture.hooks import Capture
from ine_callback.capture.layer_functions_check import layer_function_faults
from ine_callback.capture.layers import is_users, layer_function
from ine_callback.capture.routed_check import Given, find_routed
from ine_callback.capture.row_mixing import as_in_training, row_mixing_faults
from ine_callback.capture.row_order import LIKE, row_order_faults
from ine_callback.data.batches import cut, led_by
from ine_callback.utilities.isolation import isolated

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def first_batch_faults(
    module: nn.Module,
    capture: Capture,
    loss: Callable[[nn.Module, Any], object],
    batch: Any,
    rows: int,
    training: bool,
    views: bool = False,
) -> tuple[dict[nn.Module, str], list[str]]:
    """Modules to be left out -> why, and sentences for the report about what was not checked.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks.
        loss: Computes the loss of a batch.
        batch: A training batch.
        rows: Its number of rows (at least 2).
        training: Whether the passes to be captured are in training mode, where mixup and shuffles happen.
        views: Whether ``capture.views`` may be set, where the model joins several views of its rows.
    """
    with _without_batch_statistics(module):
        unchecked = "the order of rows inside the layers was not checked"
        by_rows = led_by(batch, rows)
        try:
            order, found = row_order_faults(module, capture, loss, batch, rows)
            if by_rows and found == 1:
                turned = torch.arange(rows).roll(1)
                first, then = Given(batch, range(rows)), Given(cut(batch, turned, rows), turned.tolist())
                routed = find_routed(module, capture, loss, first, then, order)
                order = {one: why for one, why in order.items() if one not in routed}
            faults = _faults(module, capture, loss, batch, rows, training and by_rows)
        except Exception as error:  # of the user's code, run on a part of a batch
            return {}, [f"{unchecked} ({type(error).__name__}: {error})"]
        mixing, functions = faults
        if by_rows and order.keys() >= mixing.keys():  # rows mixed in training alone are not seen in evaluation mode
            # what fails here costs bare parameters only, which then are named as left out
            with contextlib.suppress(Exception):
                unread = {one for one, why in order.items() if why != LIKE}
                unread |= {one for one in functions if not _is_users(one)}  # else whoever wrote it wants to know
                find_layouts(module, capture, loss, batch, rows, unread)
                running = as_in_training if training else isolated
                find_terms_of_no_row(module, capture, loss, batch, rows, running)
                capture.bare.settle()
        trained = {p for each in order for p in own_parameters(each).values() if p.requires_grad}
        if views and found > 1 and not trained <= capture.bare.layouts.keys():  # else they are read at their uses
            capture.views = found
            capture.bare.layouts.clear()  # which are of single rows
            order, (mixing, functions) = {}, _faults(module, capture, loss, batch, rows, training and by_rows)
        return functions | mixing | order, [] if by_rows else [f"{unchecked} (no part of a batch has its {rows} rows)"]


def find_new_uses(
    module: nn.Module,
    capture: Capture,
    loss: Callable[[nn.Module, Any], object],
    batch: Any,
    rows: int,
    parameters: Collection[nn.Parameter],
) -> None:
    """The checks of bare parameters once more, for some of them, in a batch that used these otherwise.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks; what is found is in ``capture.bare``.
        loss: Computes the loss of a batch.
        batch: The batch.
        rows: Its number of rows.
        parameters: Those whose uses are looked for.
    """
    if led_by(batch, rows):
        with _without_batch_statistics(module):
            find_layouts(module, capture, loss, batch, rows, set(), parameters)
            find_terms_of_no_row(module, capture, loss, batch, rows, as_in_training)
            capture.bare.settle()


@contextlib.contextmanager
def _without_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Lets a BatchNorm without running statistics pass its input on: it mixes rows in evaluation mode, too."""
    norms = [m for m in module.modules() if type(m) in _NORMS and m._buffers.get("running_mean") is None]
    handles = [norm.register_forward_hook(lambda m, args, output: args[0].clone()) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_users(module: nn.Module) -> bool:
    function = layer_function(module)
    return function is not None and is_users(function)


def _faults(
    module: nn.Module, capture: Capture, loss: Callable[[nn.Module, Any], object], batch: Any, rows: int, training: bool
) -> tuple[dict[nn.Module, str], dict[nn.Module, str]]:
    """Where rows are mixed, and which layers do not compute what their class says."""
    mixing = row_mixing_faults(module, capture, loss, batch, rows) if training else {}
    return mixing, layer_function_faults(module, capture, loss, batch, rows * capture.views)
