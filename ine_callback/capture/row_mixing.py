"""The row-mixing check, before the first step: does the training step permute or mix rows (mixup, a shuffle)?

The step is run in training mode in pairs with the same random numbers; in the second run about half of the batch's rows
change places. Nothing of the other rows may change: neither a layer's input nor the row's loss. For any two rows there
is a pair that moves only one of them, so a permutation is always found. Each pair draws other random numbers, so mixing
with probability 1/2 is missed with probability 1e-3.

Batch statistics and dropout are no faults here: leaf layers of torch.nn stay in evaluation mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ine_callback.capture.hooks import Capture
from ine_callback.capture.row_losses import read_loss
from ine_callback.data.again import Again
from ine_callback.data.batches import cut
from ine_callback.utilities.isolation import isolated, random_state

_PAIRS = 10
_PAIRS_WITH_REPLACEMENT = 3  # pairs with a further run in which half of the rows are replaced by others
_TOLERANCE = 1e-2  # relative to the input's largest number, for rounding and half precision
_LIBRARIES = ("builtins", "abc", "typing", "torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers")
_LOSS = "the rows' losses"
_LOSS_BY_VIEWS = "the rows' losses, of one view after another"
MIXED = "rows are permuted or mixed inside training_step (mixup or the like): train without for scores of single rows"
_BATCH_STATISTIC = (
    "its input holds a statistic of the batch in training: the sum over rows is exact, single rows are approximate"
)

Step = Callable[[nn.Module, Any], object]
Changes = dict[str, Tensor]  # layer name -> which rows of its inputs changed [b]


@dataclass
class _Trace:
    """What a run of the step computed.

    Attributes:
        calls: Layer name -> its inputs, call by call; and the losses of the rows, if they can be read.
        last: Name of the trained layer that was called last.
        views: How many terms of the loss there are for each row.
        state: State of the random number generators at the end.
    """

    calls: dict[str, list[Tensor]] = field(default_factory=dict)
    last: str = ""
    views: int = 1
    state: list[object] = field(default_factory=list)


def row_mixing_faults(module: nn.Module, capture: Capture, step: Step, batch: Any, rows: int) -> dict[nn.Module, str]:
    """Modules whose inputs hold other rows' data in training -> why; all modules, if the rows' losses do.

    Modules whose inputs hold a statistic of the batch are named in ``capture.approximate``. If only the loss
    has several views of the rows, one after another, ``capture.loss_views`` says how many.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks.
        step: Computes the loss of a batch.
        batch: A training batch, some part of which has ``rows`` rows.
        rows: Its number of rows.
    """
    changes: dict[int, Changes] = {}  # of rows that had stayed in their places, by seed
    ordered, coupled, draws_vary, last = set[str](), set[str](), False, ""
    for seed, half in enumerate(exchanges(rows)):
        run = partial(_run, module, capture, step, rows=rows, seed=seed)
        whole = run(batch)
        last = _LOSS if _LOSS in whole.calls else whole.last
        changed = _changes(whole, run(cut(batch, half, rows)), rows)
        if 2 < rows != len(half.unique()):  # a contrastive loss changes where a row is there twice
            changed = {name: one for name, one in changed.items() if name not in (_LOSS, _LOSS_BY_VIEWS)}
        changes[seed] = {name: rows_of & (half == torch.arange(rows)) for name, rows_of in changed.items()}
        if seed < _PAIRS_WITH_REPLACEMENT:
            other, first = run(cut(batch, replaced(rows), rows)), rows // 2
            draws_vary |= other.state != whole.state
            depends = {name for name, rows_of in _changes(whole, other, rows).items() if bool(rows_of[:first].any())}
            ordered |= {name for name in depends & changed.keys() if _is_sorted(whole, changed, name, half, rows)}
            coupled |= depends
    mixed = {name for found in changes.values() for name, rows_of in found.items() if bool(rows_of.any())}
    if draws_vary or _together():
        confirmed = _confirmed(partial(_run, module, capture, step, rows=rows), batch, changes, rows)
        mixed, coupled = (confirmed, set()) if draws_vary else (mixed, coupled)
    mixed |= ordered
    if _LOSS in mixed and _LOSS_BY_VIEWS in whole.calls and _LOSS_BY_VIEWS not in mixed:
        capture.loss_views = whole.views  # the network saw one view after another, the loss all of them
        mixed.discard(_LOSS)
    mixed.discard(_LOSS_BY_VIEWS)
    capture.approximate.update({name: _BATCH_STATISTIC for name in coupled - mixed if name in capture.names.values()})
    by_name = {name: child for child, name in capture.names.items()}
    # if the last layer's rows are mixed, all layers before it are trained on mixtures
    return {by_name[name]: MIXED for name in (by_name if last in mixed else mixed) if name in by_name}


def exchanges(rows: int) -> Iterator[Tensor]:
    """Which row takes each row's place: about half of them change places.

    Of up to 1024 rows, for any two there is an exchange that moves only one of them.

    Example:
        >>> import torch
        >>> [int((half == torch.arange(4)).sum()) for half in exchanges(4)][:3]
        [2, 2, 2]
    """
    dice = torch.Generator().manual_seed(rows)
    bits = max(1, (rows - 1).bit_length())
    for k in range(_PAIRS):
        if k % bits == 0:
            codes = torch.randperm(rows, generator=dice)
        chosen = torch.where((codes >> (k % bits)) & 1 == 1)[0]
        source = torch.arange(rows)
        source[chosen] = chosen.roll(1) if len(chosen) > 1 else (chosen + 1) % rows
        yield source


def exchanged_after(rows: int, first: int) -> Tensor:
    """All rows but those before ``first`` change places."""
    source = torch.arange(rows)
    source[first:] = source[first:].roll(1) if rows - first > 1 else 0
    return source


def replaced(rows: int) -> Tensor:
    """Copies of the first half take the places of the other rows."""
    return torch.arange(rows) % max(1, rows // 2)


def seed_everywhere(seed: int) -> None:
    """Seeds torch, NumPy and Python; only to be called inside ``isolated``."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _confirmed(run: Callable[..., _Trace], batch: Any, changes: dict[int, Changes], rows: int) -> set[str]:
    """Layers with changes in rows that stayed, even if only rows behind these change places.

    If rows draw different numbers of random numbers, an exchange changes what all rows behind it draw.
    """
    confirmed = set[str]()
    for seed, found in changes.items():
        earliest = {name: int(torch.where(changed)[0][0]) for name, changed in found.items() if changed.any()}
        staying = min(rows - 1, 1 + min(earliest.values(), default=rows // 2))
        if earliest or _together():
            after = run(cut(batch, exchanged_after(rows, staying), rows), seed=seed)
            again = _changes(run(batch, seed=seed), after, rows)
            confirmed |= {name for name in earliest if bool(again[name][:staying].any())}
    return confirmed


def _together() -> bool:
    """Whether several processes train together: their passes may be collectives, so all make the same number."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_sorted(whole: _Trace, found: Changes, name: str, half: Tensor, rows: int) -> bool:
    """Whether an input stayed the same although rows changed places: the step sorts them."""
    moved = half != torch.arange(rows)
    unlike = torch.zeros(rows, dtype=torch.bool)
    for a in whole.calls[name]:
        if a.dim() and a.shape[0] % rows == 0:
            by_row = a.reshape(rows, -1)
            unlike |= _unlike(by_row, by_row[half.to(a.device)])
    return bool((unlike & moved).any()) and not bool(found[name].any())


def _changes(whole: _Trace, other: _Trace, rows: int) -> Changes:
    found: Changes = {}
    for name, calls in whole.calls.items():
        changed = torch.zeros(rows, dtype=torch.bool)
        for a, b in zip(calls, other.calls.get(name, []), strict=False):
            # other inputs are not led by rows, or are padded to the longest row of the batch
            if a.shape == b.shape and a.dim() and a.shape[0] % rows == 0:
                changed |= _unlike(a.reshape(rows, -1), b.reshape(rows, -1))
        found[name] = changed
    return found


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """Which rows differ by more than rounding [b]."""
    if not a.numel():
        return torch.zeros(len(a), dtype=torch.bool)
    if not a.is_floating_point():
        return (a != b).any(1).cpu()
    near = _TOLERANCE * a.float().abs().nan_to_num(0.0, 0.0, 0.0).max() + 1e-6
    differs = (a - b).float().abs() > near
    return (differs | (a.isfinite() != b.isfinite())).any(1).cpu()


def _run(module: nn.Module, capture: Capture, step: Step, batch: Any, rows: int, seed: int) -> _Trace:
    trace = _Trace()
    trained = {n for child, n in capture.names.items() if any(p.requires_grad for p in child.parameters())}

    routed = {capture.names[child] for child in capture.routed}

    def observe(name: str, x: Tensor) -> None:
        if name in routed:  # which entries it gets may depend on the order of rows
            return
        trace.calls.setdefault(name, []).append(x.detach().clone())
        if name in trained:
            trace.last = name

    capture.on_call = observe
    try:
        with as_in_training(module, seed):
            loss = step(module, batch)
            trace.state = random_state(module)
            known = isinstance(loss, Tensor) and loss.requires_grad
            reading = read_loss(loss, rows, capture.views) if known else None  # type: ignore[arg-type]
            if reading is not None:
                trace.calls[_LOSS] = [reading.rows.detach()]
                trace.views = reading.each.numel() // rows
                if trace.views > capture.views == 1:
                    trace.calls[_LOSS_BY_VIEWS] = [reading.each.detach().reshape(trace.views, rows).mean(0)]
    finally:
        capture.on_call = None
    if capture.views > 1:  # those of one row side by side
        trace.calls = {n: [_side_by_side(x, rows) for x in calls] for n, calls in trace.calls.items()}
    return trace


@contextmanager
def as_in_training(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Runs the module isolated and seeded, in training mode but for leaf layers of torch.nn."""
    training = [each for each in module.modules() if each.training and not _is_plain(each)]
    restore = Again(_own_functions(module)).remember()  # what the step changes outside of the module
    try:
        with isolated(module):
            for each in training:
                each.training = True
            seed_everywhere(seed)
            yield
    finally:
        restore()


def _side_by_side(x: Tensor, rows: int) -> Tensor:
    """An input that holds views one after another [m b, ...] as [b, m, ...]."""
    return x.unflatten(0, (-1, rows)).transpose(0, 1) if x.dim() and x.shape[0] % rows == 0 else x


def _own_functions(module: nn.Module) -> list[Any]:
    """Methods of the modules' classes, without those of libraries."""
    kinds = dict.fromkeys(kind for each in module.modules() for kind in type(each).__mro__)
    users = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES]
    return [value for kind in users for value in vars(kind).values() if isinstance(value, FunctionType)]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a leaf layer of PyTorch, or a BatchNorm of any library: these only mix batch statistics."""
    norm = any(kind.__module__ == "torch.nn.modules.batchnorm" for kind in type(module).__mro__)
    return norm or (type(module).__module__.startswith("torch.nn.") and not any(module.children()))
