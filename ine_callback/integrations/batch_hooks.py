"""Whether a module's batch hooks permute or mix rows (mixup, cutmix): then a row's score is that of a mixture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ine_callback.capture.row_mixing import exchanged_after, exchanges, replaced, seed_everywhere
from ine_callback.data.batches import cut, led_by, size_of
from ine_callback.data.columns import same
from ine_callback.integrations.trainer import overrides
from ine_callback.utilities.isolation import isolated

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class BatchHooks:
    """Checks once what the user's batch hooks do to the first training batch.

    Args:
        trainer: Its datamodule may have the hooks.
        module: Or its module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        owners = [owner for owner in (module, getattr(trainer, "datamodule", None)) if owner is not None]
        self._names = [f"{type(o).__name__}.{name}" for o in owners for name in _HOOKS if overrides(o, name)]
        self._batch: Any = None

    def keep(self, batch: Any) -> Any:
        """Returns the batch; a copy stays, for hooks may change theirs in place."""
        if self._names:
            try:
                self._batch = copy.deepcopy(batch)
            except Exception as error:  # a batch that holds what cannot be copied
                self._batch = error
        return batch

    def fault(self, module: nn.Module, transfer: Callable[[Any], Any]) -> str | None:
        """What to tell the user about the hooks; None at every later call."""
        names, self._names = ", ".join(self._names), []
        batch, self._batch = self._batch, None
        if not names:
            return None
        try:
            if isinstance(batch, Exception):
                raise batch
            if not mixes_rows(module, transfer, batch, size_of(batch)):
                return None
        except Exception as error:  # a hook that cannot be called twice
            return f"whether {names} mixes rows was not checked ({type(error).__name__}: {error})"
        return (
            f"{names} mixes the rows of a batch, or their order (mixup or the like): a row's score is that of the "
            "mixture at its place; train without the mixing for scores of single rows"
        )


def mixes_rows(module: nn.Module, transfer: Callable[[Any], Any], batch: Any, rows: int) -> bool:
    """Whether what the hooks make of one row depends on another: some rows are exchanged, the others must stay.

    Args:
        module: The model, whose hooks run isolated, in the mode that it is in.
        transfer: Turns a loader's batch into what the training step sees.
        batch: A training batch as the loader made it.
        rows: Its number of rows.

    Example:
        >>> import torch
        >>> mixup = lambda batch: [batch[0] + batch[0].flip(0)]
        >>> mixes_rows(torch.nn.Identity(), mixup, [torch.arange(3.0)], 3)
        True
    """
    if rows < 2 or not led_by(batch, rows):
        return False

    def changed(source: Tensor, seed: int, count: int = rows) -> int:
        """The number of rows up to the first that stayed and changed, among the first ``count``; 0: there is none."""
        made = _rows_of(module, transfer, cut(batch, source, rows), rows, seed)
        stayed = [k for k in range(count) if source[k] == k]
        if len(made) != len(whole):
            return rows
        return next((k + 1 for k in stayed if not all(same(a[k], b[k]) for a, b in zip(whole, made, strict=True))), 0)

    for seed, half in enumerate(exchanges(rows)):
        whole = _rows_of(module, transfer, batch, rows, seed)
        if changed(replaced(rows), seed, rows // 2):
            return True
        # each row may draw as many random numbers as it needs: only those before the first that moved draw the same
        first = changed(half, seed)
        if first and changed(exchanged_after(rows, first), seed, first):
            return True
    return False


def _rows_of(module: nn.Module, transfer: Callable[[Any], Any], batch: Any, rows: int, seed: int) -> list[Tensor]:
    """Every part that has rows; the same seed draws the same random numbers."""
    modes = [(each, each.training) for each in module.modules()]
    with isolated(module), torch.no_grad():
        for each, mode in modes:
            each.training = mode
        seed_everywhere(seed)
        parts = tree_leaves(transfer(copy.deepcopy(batch)))
    return [part.clone() for part in parts if isinstance(part, Tensor) and part.dim() and len(part) == rows]
