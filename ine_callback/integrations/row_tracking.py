"""Batches of a Lightning Trainer carry their rows' ids while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from ine_callback.data.row_ids import RowTracker
from ine_callback.integrations.batch_hooks import BatchHooks
from ine_callback.integrations.patches import replaced_method


class TrackedRows:
    """Makes training batches carry their row ids, and takes these off before anybody else sees the batch.

    Args:
        trainer: Its strategy and precision plugin are patched until :meth:`release`.
        module: Its batch hooks may mix rows.
        owner: Class named in messages.
        row_fn: Finds the rows of a batch; then no loader is tracked.

    Attributes:
        tracker: Knows the loader and its number of rows.
        rows: Finds the rows of the present batch.
        hooks: Tells once whether batch hooks mix rows.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, owner: str, row_fn: Callable[[Any], Any] | None
    ) -> None:
        self.tracker = tracker = RowTracker(owner)
        self.rows: Callable[[Any], Any] = row_fn or tracker.rows_of_last
        self.hooks = hooks = BatchHooks(trainer, module)
        process, convert = trainer.strategy.process_dataloader, trainer.precision_plugin.convert_input

        def process_dataloader(loader: object) -> object:
            loader = process(loader)
            if trainer.training and row_fn is None:
                tracker.track(loader)
            return loader

        self._undo = [
            replaced_method(trainer.strategy, "process_dataloader", process_dataloader),
            replaced_method(
                trainer.precision_plugin, "convert_input", lambda batch: convert(hooks.keep(tracker.strip(batch)))
            ),
        ]

    def release(self) -> None:
        """Leaves the Trainer and its loader as they were found."""
        with contextlib.ExitStack() as stack:  # each of them, whatever fails
            for undo in self._undo:
                stack.callback(undo)
            stack.callback(self.tracker.release)
        self._undo.clear()
