"""Operations whose weight is a parameter, or computed from one: matrix products, convolutions, tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.bare.layouts import RowLayout, row_layouts
from ine_callback.capture.bare.pullback import Step, Unrecognised, looked_up
from ine_callback.capture.layers.convolution import transposed_windows, windows
from ine_callback.capture.per_sample_gradients import Kernel, Lookup, Outer, of_entries, widened
from ine_callback.capture.routed import rows_below

# by the operation's name: the place of the left one of the two matrices among its inputs, and what both are saved as
_MATRICES = {
    "MmBackward0": (0, "self", "mat2"),
    "AddmmBackward0": (1, "mat1", "mat2"),
    "BmmBackward0": (0, "self", "mat2"),
    "BaddbmmBackward0": (1, "batch1", "batch2"),
}
_TABLES = ("EmbeddingBackward0", "IndexBackward0")
_GROUPED = "GroupedMmBackward0"
_CONVOLUTION = "ConvolutionBackward0"


def is_product(step: Step) -> bool:
    """Whether the operation multiplies by it as a matrix."""
    return step.name in _MATRICES and step.index >= _MATRICES[step.name][0]


def is_convolution(step: Step) -> bool:
    """Whether it is a convolution's kernel."""
    return step.name == _CONVOLUTION and step.index == 1


def is_table(step: Step) -> bool:
    """Whether its entries are looked up."""
    return step.name in _TABLES and step.index == 0 and _ids(step.node) is not None


def is_grouped(step: Step) -> bool:
    """Whether it holds the matrices of groups of entries, which lie behind one another (experts)."""
    return step.name == _GROUPED and step.index == 1 and len(step.node._input_metadata[0].shape) == 2


def rows_of_groups(step: Step, rows: int) -> Tensor | None:
    """The row of each entry of the groups; None where it cannot be traced."""
    return rows_below(step.node, 0, rows, step.node._saved_self.device)


def grouped(step: Step, output_grads: Tensor, rows: int) -> Outer:
    """The rows' gradients of matrices [G, I, O], each of a group of entries."""
    index, entries = rows_of_groups(step, rows), step.node._saved_self.detach()
    if index is None or len(index) != len(entries):
        raise Unrecognised("a product of groups whose entries cannot be traced to rows")
    places = torch.arange(len(entries), device=entries.device)
    group = torch.searchsorted(step.node._saved_offs.long(), places, right=True)
    mine = (group[:, None] == torch.arange(step.shape[0], device=group.device)).to(torch.float32)[:, :, None, None]
    output_grads, entries = widened(output_grads), widened(entries)
    inputs = entries[:, None, None] * mine.to(entries)
    output_grads = output_grads[:, None, None].expand(-1, step.shape[0], -1, -1)
    found = of_entries(Outer(output_grads, inputs), index, rows)
    assert isinstance(found, Outer)
    return found


def layouts(step: Step, output: torch.Size, rows: int) -> list[RowLayout]:
    """Where the rows may be in the operation's output."""
    if is_grouped(step):
        return [RowLayout(0, "traced")] if rows_of_groups(step, rows) is not None else []
    if is_convolution(step):
        return [RowLayout(0, "alone")] if output[0] == rows else []
    if is_table(step):
        return row_layouts(output, step.shape[1:], rows)
    dim = len(output) - 1 - _is_right(step)
    size = output[dim]
    found = [RowLayout(dim, "alone")] if size == rows else []
    return found + [RowLayout(dim, place) for place in ("first", "last") if size > rows and size % rows == 0]


def factors(step: Step, output_grads: Tensor, layout: RowLayout, rows: int) -> tuple[Tensor, Tensor]:
    """Of a matrix product, l and r [b, G, P, .]: the rows' gradients of the matrix are the products ``l^T r``."""
    node, (first, left, right) = step.node, _MATRICES[step.name]
    other: Tensor = getattr(node, f"_saved_{left if _is_right(step) else right}").detach()
    if not other.dtype == output_grads.dtype == torch.bfloat16:
        other, output_grads = widened(other), widened(output_grads)
    if first and node._saved_alpha != 1:
        output_grads = output_grads * node._saved_alpha
    if not _is_right(step):  # of the left matrix the positions are the columns of the right one
        other, output_grads, layout = other.mT, output_grads.mT, replace(layout, dim=layout.dim - 1)
    other, output_grads = (_with_group(layout.split(x, rows)) for x in (other, output_grads))
    return (other, output_grads) if _is_right(step) else (output_grads, other)


def convolved(step: Step, output_grads: Tensor) -> Outer:
    """The rows' gradients of a convolution's kernel."""
    node = step.node
    kernel = Kernel(tuple(step.shape[2:]), tuple(node._saved_stride), tuple(node._saved_dilation), node._saved_groups)
    padding = [side for p in reversed(node._saved_padding) for side in (p, p)]
    make = transposed_windows if node._saved_transposed else windows
    return make(widened(node._saved_input.detach()), widened(output_grads), kernel, padding)


def entries(step: Step, output_grads: Tensor, layout: RowLayout, rows: int) -> Lookup:
    """The rows' gradients of a table [V, ...], as if it were a matrix [V, D]."""
    ids = _ids(step.node)
    assert ids is not None
    ids = layout.split(ids, rows).reshape(rows, -1)
    output_grads = layout.split(widened(output_grads), rows).reshape(rows, ids.shape[1], -1)
    if step.name == "EmbeddingBackward0":
        return looked_up(step.node, ids, output_grads)
    return Lookup(ids % step.shape[0], output_grads, step.shape[0])


def _is_right(step: Step) -> bool:
    """Whether it is the right one of the two matrices."""
    return step.index == _MATRICES[step.name][0] + 1


def _with_group(x: Tensor) -> Tensor:
    """Positions [b, P, K], or [b, G, P, K] of a product of batches of matrices."""
    if x.dim() > 4:
        raise Unrecognised("a product of more than three dimensions")
    return x.unsqueeze(1) if x.dim() == 3 else x


def _ids(node: Any) -> Tensor | None:
    """The entries that are looked up; None where anything else is indexed."""
    given = node._saved_indices
    if isinstance(given, Tensor):
        return given
    ids = given[0] if given else None
    known = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype not in (torch.bool, torch.uint8)
    return ids if known and all(one is None for one in given[1:]) else None
