"""Whether rows are permuted or mixed inside of the training step (mixup there, manifold mixup, a shuffle).

The step is run in training mode in pairs with the same random numbers, the second time with about half of the batch's
rows in the place of one another. What belongs to a row that stayed must not change: neither a layer's input nor the
row's loss. Any two rows are told apart by such a pair, so a permutation always shows; each pair draws other random
numbers, so mixing that is done with probability 1/2 is missed with probability 1e-3.

Batch statistics and dropout are not what is looked for: leaf layers of torch.nn stay in evaluation mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
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
from ine_callback.utilities.isolation import isolated

_PAIRS = 10
_REPLACED = 3  # pairs after which rows are also replaced, so that the batch holds others
_NEAR = 1e-2  # of the input's largest number: rounding and half precision
_LIBRARIES = ("builtins", "abc", "typing", "torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers")
_LOSS = "the rows' losses"
MIXED = "rows are permuted or mixed inside training_step (mixup or the like): train without for scores of single rows"
_SHARED = "its input holds a statistic of the batch in training: shares add up exactly, single rows do not"

Step = Callable[[nn.Module, Any], object]
Changes = dict[str, Tensor]  # layer name -> which rows of its inputs changed [b]


@dataclass
class _Shown:
    """What a run showed.

    Attributes:
        calls: Layer name -> its inputs, call by call; the losses of the rows, where they can be read.
        last: The trained layer called last.
        state: Of the random number generators in the end.
    """

    calls: dict[str, list[Tensor]] = field(default_factory=dict)
    last: str = ""
    state: list[object] = field(default_factory=list)


def mixture_faults(module: nn.Module, capture: Capture, step: Step, batch: Any, rows: int) -> dict[nn.Module, str]:
    """Modules whose inputs hold other rows' data in training -> why; all of them, where the rows' losses do.

    Those whose inputs hold a statistic of the batch are named in ``capture.approximate``.

    Args:
        module: The model; it is run isolated.
        capture: Its hooks.
        step: Computes the loss of a batch.
        batch: A training batch, some part of which has ``rows`` rows.
        rows: Its number of rows.
    """
    moved: dict[int, Changes] = {}
    order, shared, vary, last = set[str](), set[str](), False, ""
    for seed, half in enumerate(exchanges(rows)):
        run = partial(_run, module, capture, step, rows=rows, seed=seed)
        whole = run(batch)
        last = _LOSS if _LOSS in whole.calls else whole.last
        changed = _changes(whole, run(cut(batch, half, rows)), rows)
        moved[seed] = {name: rows_of & (half == torch.arange(rows)) for name, rows_of in changed.items()}
        if seed < _REPLACED:
            other, kept = run(cut(batch, replaced(rows), rows)), rows // 2
            vary |= other.state != whole.state
            touched = {name for name, rows_of in _changes(whole, other, rows).items() if bool(rows_of[:kept].any())}
            order |= {name for name in touched if _stays(whole, changed, name, half, rows)}
            shared |= touched
    mixed = {name for found in moved.values() for name, rows_of in found.items() if bool(rows_of.any())}
    if vary or _together():
        sure = _confirmed(partial(_run, module, capture, step, rows=rows), batch, moved, rows)
        mixed, shared = (sure, set()) if vary else (mixed, shared)
    mixed |= order
    capture.approximate.update({name: _SHARED for name in shared - mixed if name in capture.names.values()})
    by_name = {name: child for child, name in capture.names.items()}
    # where the end of it is mixed, everything before is trained on mixtures
    return {by_name[name]: MIXED for name in (by_name if last in mixed else mixed) if name in by_name}


def exchanges(rows: int) -> Iterator[Tensor]:
    """Which row is put in each row's place: about half of them change places.

    Of up to 1024 rows any two are told apart, in either direction.

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


def exchanged_after(rows: int, kept: int) -> Tensor:
    """All rows but the first ``kept`` change places."""
    source = torch.arange(rows)
    source[kept:] = source[kept:].roll(1) if rows - kept > 1 else 0
    return source


def replaced(rows: int) -> Tensor:
    """The rows of the first half are there again in the place of the others: the batch holds fewer."""
    return torch.arange(rows) % max(1, rows // 2)


def seed_everywhere(seed: int) -> None:
    """The random numbers of torch, NumPy and Python; to be called isolated."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _confirmed(run: Callable[..., _Shown], batch: Any, moved: dict[int, Changes], rows: int) -> set[str]:
    """Layers in whose inputs rows changed that had stayed, also where only rows behind them change places.

    Where each row draws as many random numbers as it needs, an exchange changes what all rows behind it draw.
    """
    sure = set[str]()
    for seed, found in moved.items():
        first = {name: int(torch.where(changed)[0][0]) for name, changed in found.items() if changed.any()}
        kept = min(rows - 1, 1 + min(first.values(), default=rows // 2))
        if first or _together():
            after = run(cut(batch, exchanged_after(rows, kept), rows), seed=seed)
            again = _changes(run(batch, seed=seed), after, rows)
            sure |= {name for name in first if bool(again[name][:kept].any())}
    return sure


def _together() -> bool:
    """Whether processes train together: their passes may wait for one another, so all make as many."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _stays(whole: _Shown, found: Changes, name: str, half: Tensor, rows: int) -> bool:
    """Whether no row changed although others were put in their places: they are sorted."""
    moved = half != torch.arange(rows)
    unlike = torch.zeros(rows, dtype=torch.bool)
    for a in whole.calls[name]:
        if a.dim() and a.shape[0] % rows == 0:
            by_row = a.reshape(rows, -1)
            unlike |= _unlike(by_row, by_row[half.to(a.device)])
    return bool((unlike & moved).any()) and not bool(found[name].any())


def _changes(whole: _Shown, other: _Shown, rows: int) -> Changes:
    found: Changes = {}
    for name, calls in whole.calls.items():
        changed = torch.zeros(rows, dtype=torch.bool)
        for a, b in zip(calls, other.calls.get(name, []), strict=False):
            # others are of no row, or padded to the longest row of the batch
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
    near = _NEAR * a.float().abs().nan_to_num(0.0, 0.0, 0.0).max() + 1e-6
    differs = (a - b).float().abs() > near
    return (differs | (a.isfinite() != b.isfinite())).any(1).cpu()


def _run(module: nn.Module, capture: Capture, step: Step, batch: Any, rows: int, seed: int) -> _Shown:
    shown = _Shown()
    trained = {n for child, n in capture.names.items() if any(p.requires_grad for p in child.parameters())}

    def observe(name: str, a: Tensor) -> None:
        shown.calls.setdefault(name, []).append(a.detach().clone())
        if name in trained:
            shown.last = name

    training = [each for each in module.modules() if each.training and not _is_plain(each)]
    back = Again(_own_functions(module)).remember()  # what the step counts or gathers outside of the module
    capture.on_call = observe
    try:
        with isolated(module):
            for each in training:
                each.training = True
            seed_everywhere(seed)
            loss = step(module, batch)
            shown.state = _random_state(next(module.parameters()).device)
            reading = read_loss(loss, rows) if isinstance(loss, Tensor) and loss.requires_grad else None
            if reading is not None:
                shown.calls[_LOSS] = [reading.rows.detach()]
    finally:
        capture.on_call = None
        back()
    return shown


def _own_functions(module: nn.Module) -> list[Any]:
    """Methods of the user's classes among the modules."""
    kinds = dict.fromkeys(kind for each in module.modules() for kind in type(each).__mro__)
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES]
    return [value for kind in own for value in vars(kind).values() if isinstance(value, FunctionType)]


def _is_plain(module: nn.Module) -> bool:
    """A leaf layer of PyTorch's own, or a BatchNorm of any: but for batch statistics, none mixes rows."""
    norm = any(kind.__module__ == "torch.nn.modules.batchnorm" for kind in type(module).__mro__)
    return norm or (type(module).__module__.startswith("torch.nn.") and not any(module.children()))


def _random_state(device: torch.device) -> list[object]:
    """Of the generators of torch, NumPy and Python, in a form that can be compared."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8)
    legacy: Any = np.random.get_state(legacy=True)
    torchs = [bytes(state.numpy()) for state in (torch.get_rng_state(), on_device.cpu())]
    return [*torchs, bytes(np.asarray(legacy[1])), legacy[2:], random.getstate()]
