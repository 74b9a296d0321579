"""The rows of entries that were selected by an index (the tokens of an expert), traced back in the autograd graph.

From a layer's input down: an index tells which entries of its source were selected, operations on each entry by itself
keep them, and a recorded layer's output is led by rows. An operation that is not known, or paths that do not agree,
leave the rows unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.marks import call_of
from ine_callback.capture.readable_nodes import is_readable
from ine_callback.capture.row_losses import signed

Shape = Sequence[int]
# the row of each entry of a recorded layer's output of a shape, along its first dimensions (one or two)
Base = Callable[[Shape, int], Tensor | None]
_VIEWS = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Alias")}
_VIEWS |= {f"SqueezeBackward{k}" for k in range(4)}
_UNKNOWN = ("Flip", "Roll", "Sort", "TopK", "Stack", "Scatter", "IndexPut", "IndexAdd", "Cumsum", "Unfold", "Repeat")
_DEEPEST = 64  # operations


def rows_of_selected(x: Tensor, base: Base) -> Tensor | None:
    """The row of each entry [n] of a layer's input; None where it cannot be told.

    Args:
        x: The input [n, ...], with its graph.
        base: The rows of recorded layers' outputs.
    """
    if x.grad_fn is None or not x.dim():
        return None
    rows = _traced(x.grad_fn, x.output_nr, 0, base, _DEEPEST)
    return rows if rows is not None and len(rows) == len(x) else None


def rows_below(node: Any, k: int, rows: int, device: torch.device) -> Tensor | None:
    """The row of each entry [n] that leads an operation's k-th input; None where it cannot be told."""
    return _below(node, k, 0, base_of(rows, None, device), _DEEPEST)


def base_of(rows: int, entries: EntryIndex | None, device: torch.device) -> Base:
    """The rows of the outputs of layers whose inputs rows lead, or entries.

    Args:
        rows: Number of rows b.
        entries: The row of each entry, where rows do not lead.
        device: Of the layer's input.
    """

    def base(shape: Shape, dims: int) -> Tensor | None:
        if entries is not None:
            return entries.along(shape, dims)
        led = dims == 1 and shape[0] % rows == 0
        return torch.arange(rows, device=device).repeat_interleave(shape[0] // rows) if led else None

    return base


def _traced(node: Any, output: int, dim: int, base: Base, depth: int) -> Tensor | None:
    """The row of each entry along one dimension of an operation's output."""
    shape, name = node._input_metadata[output].shape, node.name()
    call = call_of(node)
    if call is not None:
        return None if dim else base(shape, 1) if call.rows is None else call.rows
    if not depth or name.startswith(_UNKNOWN):
        return None
    if name == "CatBackward0" and signed(node._saved_dim) % len(shape) == dim:
        parts = [_below(node, k, dim, base, depth) for k in range(len(node.next_functions))]
        known = [one for one in parts if one is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if name in _VIEWS:
        return _viewed(node, shape, dim, base, depth)
    if name in _SELECTIONS:
        return _SELECTIONS[name](node, output, dim, base, depth) if is_readable(node) else None
    found: Tensor | None = None
    for k, (below, place) in enumerate(node.next_functions):
        at = None if below is None else _same_place(below._input_metadata[place].shape, shape, dim)
        rows = None if at is None else _below(node, k, at, base, depth)
        if rows is not None and found is not None and rows is not found and not torch.equal(rows, found):
            return None
        found = rows if found is None else found
    return found


def _below(node: Any, k: int, dim: int, base: Base, depth: int) -> Tensor | None:
    below, output = node.next_functions[k]
    return None if below is None else _traced(below, output, dim, base, depth - 1)


def _source(node: Any) -> Shape:
    """Shape of an operation's first input."""
    below, output = node.next_functions[0]
    shape: Shape = below._input_metadata[output].shape
    return shape


def _same_place(before: Shape, after: Shape, dim: int) -> int | None:
    """The dimension of an input that is the output's, of an operation on each entry by itself."""
    if list(before[: dim + 1]) == list(after[: dim + 1]):
        return dim
    at = dim - len(after) + len(before)  # broadcast
    return at if at >= 0 and before[at] == after[dim] else None


def _viewed(node: Any, after: Shape, dim: int, base: Base, depth: int) -> Tensor | None:
    """Through another shape of the same numbers: rows with their positions may be flattened, [b, T] to [b T]."""
    if node.next_functions[0][0] is None:
        return None
    before, size, ahead = _source(node), after[dim], math.prod(after[:dim])
    for at in reversed(range(len(before))):
        if math.prod(before[:at]) != ahead:
            continue
        if before[at] == size:
            return _below(node, 0, at, base, depth)
        if at + 1 < len(before) and before[at] * before[at + 1] == size:
            call = call_of(node.next_functions[0][0])
            pairs = base(before, 2) if call is not None and call.rows is None and not at else None
            rows = _below(node, 0, at, base, depth) if pairs is None else None
            return pairs if rows is None else rows.repeat_interleave(before[at + 1])
    return None


def _indexed(node: Any, output: int, dim: int, base: Base, depth: int) -> Tensor | None:
    """x[index], x[:, index], x[i, j] or x[mask]."""
    given = [(d, one) for d, one in enumerate(node._saved_indices) if one is not None]
    if not given or node.next_functions[0][0] is None:
        return None
    first, index = given[0]
    if dim < first:
        return _below(node, 0, dim, base, depth)
    boolean = index.dtype in (torch.bool, torch.uint8)
    if dim > first or (index.dim() != 1 and not boolean):
        return None
    source = _below(node, 0, first, base, depth)
    if source is None or len(source) != _source(node)[first]:
        return None
    return source[index.nonzero()[:, 0] if boolean else index]


def _along(pick: Callable[[Any, int, Tensor], Tensor]) -> Callable[[Any, int, int, Base, int], Tensor | None]:
    """A selection along one dimension, which leaves the others as they are."""

    def selected(node: Any, output: int, dim: int, base: Base, depth: int) -> Tensor | None:
        if node.next_functions[0][0] is None:
            return None
        source, axis = _below(node, 0, dim, base, depth), signed(node._saved_dim) % len(_source(node))
        if source is None or len(source) != _source(node)[dim]:
            return None
        return source if axis != dim else pick(node, output, source)

    return selected


def _sliced(node: Any, output: int, source: Tensor) -> Tensor:
    start, end = (signed(one) for one in (node._saved_start, node._saved_end))
    return source[start : min(end, len(source)) : node._saved_step]


def _transposed(node: Any, output: int, dim: int, base: Base, depth: int) -> Tensor | None:
    dims = len(_source(node))
    swapped = [signed(one) % dims for one in (node._saved_dim0, node._saved_dim1)]
    return _below(node, 0, swapped[1 - swapped.index(dim)] if dim in swapped else dim, base, depth)


_SELECTIONS: dict[str, Callable[[Any, int, int, Base, int], Tensor | None]] = {
    "IndexBackward0": _indexed,
    "IndexSelectBackward0": _along(lambda node, _, source: source[node._saved_index]),
    "GatherBackward0": _along(lambda node, _, source: source[node._saved_index.flatten(1)[:, 0]]),
    "SliceBackward0": _along(_sliced),
    "SplitBackward0": _along(lambda node, k, source: source.split(node._saved_split_size)[k]),
    "SplitWithSizesBackward0": _along(lambda node, k, source: source.split(list(node._saved_split_sizes))[k]),
    "TransposeBackward0": _transposed,
    "TransposeBackward1": _transposed,
    "PermuteBackward0": lambda node, _, dim, base, depth: _below(node, 0, signed(node._saved_dims[dim]), base, depth),
    "TBackward0": lambda node, _, dim, base, depth: None,
}
