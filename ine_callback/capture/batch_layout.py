"""Where a batch's rows are in what layers get, and a call's per-sample gradients by row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.layers import LayerFunction, RowMismatch, entries_of, grad_samples_of
from ine_callback.capture.layers.calls import Tensors
from ine_callback.capture.per_sample_gradients import GradSample, of_entries

UNKNOWN_ENTRIES = (
    "its input has {} entries for {} rows, and whose they are could not be checked; call it with one entry of each row "
    "(true and made rows apart)"
)


@dataclass(frozen=True)
class BatchLayout:
    """Where a batch's rows are.

    Attributes:
        rows: Number of rows b.
        views: How many views of the rows layers get, one after another.
        one_each: Whether a layer must get one entry of each row.
        entries: The row of each entry, where rows do not lead.
    """

    rows: int
    views: int
    one_each: bool
    entries: EntryIndex | None

    def by_row(
        self,
        module: nn.Module,
        selected: Tensor | None,
        activations: Tensors,
        output_grads: Tensors,
        function: LayerFunction | None,
    ) -> list[dict[str, GradSample]]:
        """Per-sample gradients by row: as one call of the layer, or as one for each entry of a row.

        Args:
            module: The layer.
            selected: The row of each entry that an index selected for it.
            activations: What it got.
            output_grads: The gradients of what it returned.
            function: Its layer function; None: that of its type.

        Raises:
            RowMismatch: Where the input does not divide into the batch's rows.
        """
        if selected is not None:
            found = grad_samples_of(module, activations, output_grads, len(selected), function)
            return [{name: of_entries(one, selected, self.rows) for name, one in found.items()}]
        if self.entries is not None:
            return [self.entries.grad_samples(module, activations, output_grads, function)]
        if self.one_each and isinstance(activations, Tensor) and activations.shape[:1] != (self.rows,):
            raise RowMismatch(UNKNOWN_ENTRIES.format(activations.shape[0], self.rows))
        count = self.views * entries_of(activations, self.rows * self.views)
        entries = grad_samples_of(module, activations, output_grads, self.rows * count, function)
        if count == 1:
            return [entries]
        joined = {name: each.by_row(count, self.views == 1) for name, each in entries.items()}
        if all(each is not None for each in joined.values()):
            return [joined]  # type: ignore[list-item]
        split = {name: each.split(count, self.views == 1) for name, each in entries.items()}
        return [{name: uses[k] for name, uses in split.items()} for k in range(count)]
