"""The rows of a batch in which rows do not lead: packed texts, the nodes and edges of graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowEntries:
    """The rows of a batch, and the row of each of its entries; what ``row_fn`` returns where rows do not lead.

    Args:
        rows: Dataset index of each row (text, graph) [b].
        of_entries: For each kind of entries (tokens; nodes, edges) the place in ``rows`` that each belongs to, of any
            shape: tokens [B, T], nodes [n]. -1: no row, such as padding.

    Example:
        >>> import torch
        >>> graphs, graph_of_node = torch.tensor([17, 4]), torch.tensor([0, 0, 0, 1, 1])
        >>> RowEntries(graphs, graph_of_node).sizes()
        [(5,)]
    """

    rows: Any
    of_entries: Any

    def sizes(self) -> list[tuple[int, ...]]:
        """The shape of each kind of entries."""
        return [tuple(one.shape) for one in self.each()]

    def each(self) -> list[Tensor]:
        """The kinds of entries."""
        given = self.of_entries
        return [torch.as_tensor(one) for one in (given if isinstance(given, list | tuple) else [given])]

    @classmethod
    def of_tokens(cls, ids: Tensor) -> RowEntries:
        """Packed rows, from the dataset index of each token's text [B, T]; -1: no text.

        Synchronises with the device, as the texts must be counted.

        Example:
            >>> RowEntries.of_tokens(torch.tensor([[5, 5, 9], [9, 2, -1]]))
            RowEntries(rows=tensor([2, 5, 9]), of_entries=tensor([[ 1,  1,  2],
                    [ 2,  0, -1]]))
        """
        rows, places = ids.unique(return_inverse=True)
        none = int((rows < 0).sum())
        return cls(rows[none:], (places - none).clamp_min(-1))


def row_entries(found: Any) -> RowEntries | None:
    """What ``row_fn`` returned as rows with entries: so given, or ids [B, T] of tokens; None where rows lead."""
    if isinstance(found, RowEntries):
        return found
    if isinstance(found, Tensor) and found.dim() == 2 and found.shape[1] > 1 and not found.is_floating_point():
        return RowEntries.of_tokens(found)
    return None
