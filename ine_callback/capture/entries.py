"""Which row each entry of a layer's input belongs to, where rows do not lead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.layers import LayerFunction, RowMismatch, grad_samples_of
from ine_callback.capture.layers.calls import Tensors
from ine_callback.capture.per_sample_gradients import GradSample, of_entries
from ine_callback.data.batches import led_by
from ine_callback.data.row_entries import RowEntries
from ine_callback.errors import RowsError, UnknownRows


class EntryIndex:
    """Finds the rows of a tensor's entries by the shape that it begins with.

    Args:
        entries: The batch's rows and entries.
        rows: Number of rows b.
        device: Where the index is needed.
        owner: Class named in messages.

    Raises:
        RowsError: If an index is no tensor of integers.
        UnknownRows: If two kinds of entries are equally many, so that a layer's input does not tell which it holds.
    """

    def __init__(self, entries: RowEntries, rows: int, device: torch.device, owner: str) -> None:
        self.rows = rows
        self._kinds: list[tuple[tuple[int, ...], Tensor]] = []
        for one in entries.each():
            if one.is_floating_point() or not one.dim():
                raise RowsError(
                    f"{owner}: RowEntries(of_entries=...) of shape {tuple(one.shape)} and {one.dtype} tells no rows; "
                    "give the place in rows that each entry belongs to, as integers."
                )
            one = one.to(device, torch.int64, non_blocking=True)
            self._kinds.append((tuple(one.shape), torch.where(one < 0, rows, one).flatten()))
        counts = [index.numel() for _, index in self._kinds]
        if len(set(counts)) < len(counts) or rows in counts:
            raise UnknownRows(
                f"{owner}: a batch of {rows} rows with {' and '.join(map(str, counts))} entries: a layer's input does "
                "not tell which of them it holds, as two are equally many"
            )

    def leading(self, batch: Any) -> int:
        """How many rows, or packed sequences, a batch can be cut into."""
        packed = [kind[0] for kind, _ in self._kinds if len(kind) > 1]
        return next((size for size in (self.rows, *packed) if led_by(batch, size)), self.rows)

    def along(self, shape: Sequence[int], dims: int) -> Tensor | None:
        """The row of each entry [n] along the first dimensions of a tensor of this shape; None where it has no such."""
        found = self.find(shape)
        if found is not None:
            return found[0] if found[1] == dims else None
        return torch.arange(self.rows, device=self._kinds[0][1].device) if dims == 1 and shape[0] == self.rows else None

    def find(self, shape: Sequence[int]) -> tuple[Tensor, int] | None:
        """The row of each entry [n], and how many dimensions of a tensor of this shape count entries; None: no entries.

        Tokens [B, T] may be flattened.
        """
        for kind, index in self._kinds:
            if tuple(shape[: len(kind)]) == kind:
                return index, len(kind)
            if shape and shape[0] == index.numel():
                return index, 1
        return None

    def of(self, shape: Sequence[int]) -> tuple[Tensor | None, int]:
        """The row of each entry [n] of a tensor of this shape, and how many dimensions count entries; None: of rows.

        Raises:
            RowMismatch: If it is led by neither.
        """
        if tuple(shape[:1]) == (self.rows,):
            return None, 1
        found = self.find(shape)
        if found is None:
            kinds = " or ".join(str(list(kind)) for kind, _ in self._kinds)
            raise RowMismatch(
                f"its input of shape {tuple(shape)} is led neither by the {self.rows} rows nor by entries {kinds}"
            )
        return found

    def grad_samples(
        self, module: nn.Module, activations: Tensors, output_grads: Tensors, function: LayerFunction | None
    ) -> dict[str, GradSample]:
        """The rows' gradients of one call of a layer.

        Raises:
            RowMismatch: If its input is led neither by rows nor by entries.
        """
        if not (isinstance(activations, Tensor) and isinstance(output_grads, Tensor)):
            raise RowMismatch("it has several inputs or outputs, whose entries are not told apart by row")
        index, dims = self.of(activations.shape)
        if index is None:
            return grad_samples_of(module, activations, output_grads, self.rows, function)
        if not index.numel():  # graphs without edges
            return {}
        activations, output_grads = activations.flatten(0, dims - 1), output_grads.flatten(0, dims - 1)
        found = grad_samples_of(module, activations, output_grads, index.numel(), function)
        return {name: of_entries(one, index, self.rows) for name, one in found.items()}
