"""Row losses from the user's function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ine_callback.data.batches import cut, is_all_led_by
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.rows import (
    CUT_ERRORS,
    MAX_PASS_ROWS,
    SAMPLE_ROWS,
    WHOLE_BATCH_NOTE,
    Batch,
    RowLosses,
    Rows,
    alike,
    rows_in,
    spread,
)

RowLoss = Callable[[nn.Module, Batch], Tensor]


class UserRowLosses(RowLosses):
    """Row losses from the user's function; their mean is taken for the training's loss.

    Args:
        function: ``(module, batch) -> losses [b]``, or [b, T] for rows of T terms, whose mean is the row's loss.
        name: Its name in messages.
        owner: Class named in messages.
    """

    def __init__(self, function: RowLoss, name: str, owner: str) -> None:
        self._function, self._name, self._owner = function, name, owner

    def verify(self, module: nn.Module, batch: Batch, count: int | None) -> None:
        """Calls the function on some rows, and on two of these alone.

        Args:
            module: The module.
            batch: A batch.
            count: Its rows, where known.

        Raises:
            InfluenceError: If it does not return a loss for each row, or a row's loss depends on other rows.
        """
        size = rows_in(batch, count)
        if size is not None:
            try:
                return self._verify_rows(module, cut(batch, spread(size, SAMPLE_ROWS), size), min(SAMPLE_ROWS, size))
            except (*CUT_ERRORS, InfluenceError):
                if is_all_led_by(batch, size):
                    raise
        self._losses(module, batch, count)
        self.whole, self.note = True, WHOLE_BATCH_NOTE

    def _verify_rows(self, module: nn.Module, batch: Batch, size: int) -> None:
        losses = self._losses(module, batch, size)
        if not alike(self._losses(module, batch, size), losses):
            return  # the losses are random, so nothing can be compared
        ends = torch.tensor([0, size - 1]).unique()
        if not alike(self._losses(module, cut(batch, ends, size), len(ends)), losses[ends.to(losses.device)]):
            raise InfluenceError(
                f"{self._owner}: {self._name} returns other losses for rows when other rows are beside them; a row's "
                "loss must not depend on other rows."
            )

    def _losses(self, module: nn.Module, batch: Batch, rows: int | None) -> Tensor:
        with torch.no_grad():
            losses = self._function(module, batch)
        good = isinstance(losses, Tensor) and losses.dim() in (1, 2)
        if not good or (rows is not None and len(losses) != rows):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            size = "b" if rows is None else rows
            raise InfluenceError(
                f"{self._owner}: {self._name} returned {got} for a batch of {size} rows; return losses [{size}], or "
                f"[{size}, terms]."
            )
        return losses if losses.dim() == 1 else losses.mean(1)

    def rows(self, module: nn.Module, batch: Batch, max_rows: int = MAX_PASS_ROWS, count: int | None = None) -> Rows:
        size = None if self.whole else rows_in(batch, count)
        if size is None:
            losses = self._losses(module, batch, count)
            picked = torch.arange(len(losses), device=losses.device)
            rows = Rows(batch, len(losses), torch.ones_like(losses), picked=picked)
        else:
            pieces = Rows(batch, size, torch.ones(size)).split(max_rows)
            losses = torch.cat([self._losses(module, piece.batch, len(piece)) for piece in pieces])
            rows = Rows(batch, size, torch.ones_like(losses))
        if not bool(torch.isfinite(losses).all()):
            bad = torch.where(~torch.isfinite(losses))[0]
            raise InfluenceError(
                f"{self._owner}: {self._name} returned losses that are not finite for {len(bad)} of {len(losses)} "
                f"rows, such as row {int(bad[0])}; return 0 for a row without a term."
            )
        return rows

    def terms(self, module: nn.Module, rows: Rows) -> Tensor:
        losses = self._function(module, rows.batch)
        if rows.picked is not None:
            losses = losses[rows.picked]
        return losses[:, None] if losses.dim() == 1 else losses / losses.shape[1]
