"""Where the rows of a batch are in the output of an operation, and sums over everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Which dimension of a tensor holds the rows.

    Attributes:
        dim: The dimension.
        place: ``"alone"``; or with other positions flattened into the dimension: ``"first"`` [b * k], as rows with
            their tokens, or ``"last"`` [k * b], time first; or ``"pairs"``: it and the next are entries, all of them;
            or ``"traced"``: entries of rows that the graph tells.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # [T, b]
        >>> RowLayout(1, "alone").summed(x, rows=2, shape=(3, 1))
        tensor([[[1.],
                 [3.],
                 [5.]],
        <BLANKLINE>
                [[2.],
                 [4.],
                 [6.]]])
    """

    dim: int
    place: str

    def fits(self, shape: Sequence[int], rows: int) -> bool:
        """Whether a tensor of this shape can hold so many rows there."""
        if self.dim >= len(shape):
            return False
        if self.place == "traced":
            return True
        if self.place == "pairs":
            return self.dim + 1 < len(shape) and shape[self.dim] * shape[self.dim + 1] == rows
        return shape[self.dim] == rows if self.place == "alone" else shape[self.dim] % rows == 0

    def split(self, x: Tensor, rows: int) -> Tensor:
        """x with the rows first [b, ...]; what is flattened with them stays where they were."""
        if self.place == "pairs":
            return x.flatten(self.dim, self.dim + 1).unsqueeze(self.dim + 1).movedim(self.dim, 0)
        if self.place == "alone":
            return x.unsqueeze(self.dim + 1).movedim(self.dim, 0)
        split: Tensor = x.unflatten(self.dim, (rows, -1) if self.place == "first" else (-1, rows))
        return split.movedim(self.dim + (self.place == "last"), 0)

    def summed(self, x: Tensor, rows: int, shape: Sequence[int]) -> Tensor:
        """Sums of x [b, *shape] over all but the rows and the dimensions of what was broadcast to x."""
        return summed_to(self.split(x, rows), shape)


def summed_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x [b, ...] as [b, *shape]: sums over the dimensions to which a tensor of this shape was broadcast."""
    lead = x.dim() - len(shape)
    dims = [*range(1, lead), *(lead + d for d, n in enumerate(shape) if n == 1 and x.shape[lead + d] != 1)]
    return (x.sum(dims) if dims else x).reshape(len(x), *shape)


def pair_layouts(output: Sequence[int], shape: Sequence[int], rows: int) -> list[RowLayout]:
    """The layout in which the first two dimensions are entries, all ``rows`` of them, if the tensor has neither."""
    lead = len(output) - len(shape)
    free = len(output) > 1 and all(d < lead or shape[d - lead] == 1 for d in (0, 1))
    return [RowLayout(0, "pairs")] if free and output[0] * output[1] == rows else []


def row_layouts(output: Sequence[int], shape: Sequence[int], rows: int) -> list[RowLayout]:
    """Where rows may be in an output to which a tensor was broadcast: only in dimensions that this one does not have.

    Args:
        output: Shape of the output.
        shape: Shape of what was broadcast.
        rows: Number of rows b.

    Example:
        >>> row_layouts((4, 5, 8), (1, 5, 8), rows=4)
        [RowLayout(dim=0, place='alone')]
        >>> row_layouts((20, 8), (8,), rows=4)
        [RowLayout(dim=0, place='first'), RowLayout(dim=0, place='last')]
    """
    lead = len(output) - len(shape)
    free = [d for d in range(len(output)) if d < lead or shape[d - lead] == 1]
    found = [RowLayout(d, "alone") for d in free if output[d] == rows]
    if 0 in free and output[0] > rows and output[0] % rows == 0:
        found += [RowLayout(0, "first"), RowLayout(0, "last")]
    return found
