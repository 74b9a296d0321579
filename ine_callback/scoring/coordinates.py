r"""Coordinates of gradients: few entries in the eigenbasis of each layer's curvature, of all layers together.

A layer's gradient G [O, I] has the entries ``l_a^T G r_b`` between eigenvectors of K-FAC's factors. In the Fisher each
has the variance ``lambda_a rho_b``, the product of the eigenvalues. Those with the largest variance, times what the
optimizer moves the layer by, are taken: of all layers together as many as asked for. In scores the leading directions
of the curvature count most even after the discount, which bounds their part and does not reverse it (Spearman with the
uncompressed scores on G1: .97 with 1024 of 1962 entries, .49 with 1024 Rademacher projections).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.capture import Block, GradSample, Lookup, Outer, Vector
from ine_callback.capture.per_sample_gradients import Ragged, row_chunks, widened
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import SpectralOperator, Spectrum, identity
from ine_callback.curvature.stored_gradients import StoredGradients

BISECTIONS = 60  # of the logarithm of the smallest variance taken
MOVED = 32  # how many times smaller than other chunks those of moved rows are: they should stay in a processor's cache
MAX_MATRIX = 1 << 25  # numbers of a matrix between two bases (134 MB), by which one product moves
MANY_ROWS = 256  # so many rows: for fewer it takes longer to be made than it saves
MAX_COLUMNS = 1 << 26  # entries of a tied weight's columns on one side, which are 0 and 1: 256 MB


@dataclass(frozen=True)
class BlockBasis:
    """The entries of one block's gradients that are taken.

    Attributes:
        index: Places of the n entries, in the flattened rectangle [G, k, l]; of a vector in itself.
        sides: Columns left [G, O, k] and right [G, I, l]; None for a vector.
    """

    index: Tensor
    sides: tuple[Tensor, Tensor] | None = None

    def of(self, grad_sample: GradSample) -> Tensor:
        """Entries [b, n] of per-sample gradients, in float32 or better."""
        if self.sides is None:
            assert isinstance(grad_sample, Vector)
            return widened(grad_sample.g)[:, self.index]
        left, right = self.sides
        if isinstance(grad_sample, Lookup):  # its left side are the table's entries
            entries = grad_sample.transposed()
            transposed = _between(entries, *_projected(entries, right, left))
            return transposed.transpose(-1, -2).flatten(1)[:, self.index]
        assert isinstance(grad_sample, Outer)
        output_grads, inputs = _projected(grad_sample, left, right)
        if grad_sample.positions == 1:
            return self._of_pairs(output_grads, inputs)
        return _between(grad_sample, output_grads, inputs).flatten(1)[:, self.index]

    def _of_pairs(self, output_grads: Tensor, inputs: Tensor) -> Tensor:
        """Entries [b, n] of outer products: one product for each, as the rectangle may be many times larger."""
        of_left, of_right = self._pairs
        return output_grads.flatten(1).index_select(1, of_left) * inputs.flatten(1).index_select(1, of_right)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Places of each entry's column, among all of the left side's [G k] and of the right side's [G l]."""
        assert self.sides is not None
        rows, columns = (side.shape[2] for side in self.sides)
        return self.index // columns, self.index // (rows * columns) * columns + self.index % columns

    def of_stored(self, rows: StoredGradients) -> Tensor:
        """Entries [n, ...] of stored gradients."""
        if self.sides is None:
            return rows.right[:, self.index]
        left, right = (side.to(rows.right.dtype) for side in self.sides)  # stored rows are of single precision
        if rows.left is not None:
            return self._of_pairs(*(torch.einsum("ngx,gxk->ngk", *p) for p in ((rows.left, left), (rows.right, right))))
        out = rows.right.new_empty(len(rows.right), len(self.index))
        for some in row_chunks(len(out), left.shape[0] * left.shape[2] * right.shape[2]):
            out[some] = (left.transpose(-1, -2) @ rows.right[some] @ right).flatten(1)[:, self.index]
        return out

    def of_vectors(self, v: Tensor) -> Tensor:
        """Entries [Q, n] of vectors [Q, *layout]."""
        if self.sides is None:
            return v[:, self.index]
        left, right = self.sides
        return (left.transpose(-1, -2) @ v.to(left.dtype) @ right).flatten(1)[:, self.index]

    def diagonal(self, kfac: KFAC, block: Block, spectrum: Spectrum = identity) -> Tensor:
        """A function of the block's Fisher at each entry [n]; of the Fisher itself: the entries' variances.

        Entries are taken for those of the present eigenbasis. To rotate them into it and back would cost many training
        steps for each one (28 of a small MLP), and tells hardly more: Spearman with the run on G1 .9522 instead of
        .9510, with AdamW .9459 instead of .9457.
        """
        if self.sides is None:
            weight = kfac.operator(block, spectrum).weight
            assert weight is not None
            return weight[self.index]
        return kfac.diagonal(block, *self.sides, spectrum).flatten()[self.index]

    def moved(self, x: Tensor, before: BlockBasis) -> Tensor:
        """Entries x [b, n'] in another basis, in this one; what this one does not span is lost."""
        if self.sides is None or before.sides is None:
            full = x.new_zeros(len(x), int(max(self.index.max(), before.index.max())) + 1)
            full[:, before.index] = x
            return full[:, self.index]
        left, right = (new.transpose(-1, -2) @ old for new, old in zip(self.sides, before.sides, strict=True))
        if len(x) >= MANY_ROWS and len(self.index) * len(before.index) <= MAX_MATRIX:  # more arithmetic, done faster
            return x.to(right) @ self._from(before, left, right).T
        groups = range(len(left))
        stairs = [(list(_bands(_staircase(before, g))), list(_bands(_staircase(self, g).T))) for g in groups]
        out = x.new_empty(len(x), len(self.index))
        for some in row_chunks(len(x), MOVED * left.shape[2] * right.shape[1]):
            columns = x[some].to(right).T.contiguous()  # rows are last throughout: all else picks whole stretches
            found = right.new_empty(len(self.index), columns.shape[1])
            for group, (taken, filled) in enumerate(stairs):
                turned = right.new_zeros(left.shape[2], right.shape[1], columns.shape[1])
                for band in taken:
                    known = columns.index_select(0, band.entries).mul_(band.there[:, None])
                    turned[band.outer] = right[group][:, band.inner] @ known.unflatten(0, band.shape)
                for band in filled:
                    made = left[group][band.inner] @ turned.index_select(1, band.outer).flatten(1)
                    entries, there = (x.view(band.shape).T.flatten() for x in (band.entries, band.there))
                    found[entries[there]] = made.view(-1, columns.shape[1])[there]
            out[some] = found.T.to(out)
        return out

    def _from(self, before: BlockBasis, left: Tensor, right: Tensor) -> Tensor:
        """The matrix [n, n'] from another basis's entries to these, by both sides' [G, k, k'] and [G, l, l']."""
        on_left, on_right = (
            side.flatten(0, 1)[own][:, other % side.shape[2]]
            for side, own, other in zip((left, right), self._pairs, before._pairs, strict=True)
        )
        if len(left) > 1:  # nothing leads from one group to another
            own, other = self._pairs[0] // left.shape[1], before._pairs[0] // left.shape[2]
            on_left = on_left * (own[:, None] == other)
        return on_left * on_right


@dataclass(frozen=True)
class _Band:
    """Some rows of a staircase with about as many columns each: a small rectangle.

    Attributes:
        outer: The rows.
        inner: The columns.
        entries: Which entry each place is [rows x columns]; any, where none is there.
        there: Whether one is.
    """

    outer: Tensor
    inner: Tensor
    entries: Tensor
    there: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.outer), len(self.inner)


def _staircase(basis: BlockBasis, group: int) -> Tensor:
    """The numbers of a group's entries by their place, -1 where there is none [k, l]."""
    assert basis.sides is not None
    rows, columns = (side.shape[2] for side in basis.sides)
    places = torch.full((len(basis.sides[0]) * rows * columns,), -1, device=basis.index.device)
    places[basis.index] = torch.arange(len(basis.index), device=places.device)
    return places.view(-1, rows, columns)[group]


def _bands(places: Tensor) -> Iterator[_Band]:
    """Rows of a staircase [k, l] with 1, 2, 3-4, 5-8, ... columns at a time: of the rectangle little is filled."""
    counts = (places >= 0).sum(1)
    sizes = counts.clamp_min(1).double().log2().ceil()
    for size in sizes[counts > 0].unique():
        outer = ((counts > 0) & (sizes == size)).nonzero()[:, 0]
        inner = (places[outer] >= 0).any(0).nonzero()[:, 0]
        entries = places[outer][:, inner].flatten()
        yield _Band(outer, inner, entries.clamp_min(0), entries >= 0)


def _projected(grad_sample: Outer, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Output gradients [b, G, P, k] and inputs [b, G, P, l] on columns; they are widened when they are small."""
    inputs = widened(grad_sample.projected(right))
    columns = left.to(grad_sample.output_grads.dtype)
    # one group's 2-d columns make one product of all rows, not one for each
    output_grads = widened(grad_sample.output_grads @ (columns[0] if len(columns) == 1 else columns))
    return output_grads, inputs.to(output_grads.dtype)


def _between(grad_sample: Outer, output_grads: Tensor, inputs: Tensor) -> Tensor:
    """Gradients [b, G, k, l] between the columns that both are on."""
    if not isinstance(grad_sample, Ragged):
        return output_grads.transpose(-1, -2) @ inputs
    total = inputs.new_zeros(grad_sample.count + 1, inputs.shape[1], output_grads.shape[-1], inputs.shape[-1])
    for some in row_chunks(len(inputs), total[0].numel()):  # of entries, which are added up by row
        total.index_add_(0, grad_sample.index[some], output_grads[some].transpose(-1, -2) @ inputs[some])
    return total[: grad_sample.count]


def choose(
    blocks: Mapping[Block, float], kfac: KFAC, dimensions: int, device: torch.device, by: KFAC | None = None
) -> dict[Block, BlockBasis]:
    """The entries of the largest variance, at most ``dimensions``, of all blocks that the curvature knows.

    Args:
        blocks: What each block's variances count: as many times.
        kfac: The curvature.
        dimensions: Most entries.
        device: Where the bases live.
        by: The curvature whose variances count; None: the same.
    """
    operators = {block: kfac.operator(block, identity) for block in blocks}
    if by is not None:
        operators = {block: _measured(block, one, by) for block, one in operators.items()}
    known = {block: one for block, one in operators.items() if one.formed is not None}
    variances = [_variances(one, blocks[block], dimensions) for block, one in known.items()]
    least = _threshold(variances, [_groups(block, one) for block, one in known.items()], dimensions)
    found = {}
    for (block, one), sides in zip(known.items(), variances, strict=True):
        basis = _basis(block, one, sides, least, device)
        if basis is not None:
            found[block] = basis
    return found


def _measured(block: Block, operator: SpectralOperator, by: KFAC) -> SpectralOperator:
    """The same eigenvectors with the variances of another curvature."""
    there = by.operator(block, identity)
    if operator.formed is None or there.formed is None or operator.sides is None or operator.entrywise:
        return there
    left, right = operator.sides
    of_left, of_right = by.along(block, left.columns, right.columns)
    return replace(operator, sides=(replace(left, values=of_left), replace(right, values=of_right)))


Sides = tuple[NDArray[np.float64], NDArray[np.float64]]  # descending, of the left and the right side


def _variances(operator: SpectralOperator, times: float, most: int) -> Sides:
    """Eigenvalues of both sides, means over the groups; their products are variances.

    Where entries have variances of their own (vectors, and tied weights, whose Fisher is a diagonal), the largest ones
    are on the right.
    """
    if operator.sides is None or operator.entrywise:
        weight = operator.weight
        assert weight is not None
        values = weight.flatten().topk(min(most, weight.numel())).values
        return np.ones(1), values.double().cpu().numpy() * times
    left, right = (side.values.double().sort(-1, descending=True).values.mean(0).cpu() for side in operator.sides)
    return left.numpy() * times, right.numpy()


def _groups(block: Block, operator: SpectralOperator) -> int:
    return block.layout[0] if len(block.layout) == 3 and not operator.entrywise else 1


def _counts(sides: Sides, least: float) -> NDArray[np.int64]:
    """How many right values go with each left one."""
    left, right = sides
    with np.errstate(divide="ignore", over="ignore"):
        return np.searchsorted(-right, -least / np.maximum(left, 1e-300), side="right")


def _threshold(variances: Sequence[Sides], groups: Sequence[int], dimensions: int) -> float:
    """The smallest variance such that at most ``dimensions`` entries have it."""
    most = max((float(left[0] * right[0]) for left, right in variances), default=0.0)
    if most <= 0:
        return 1.0
    low, high = np.log(most) - 100.0, np.log(most) + 1e-9
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        size = sum(
            g * int(_counts(sides, float(np.exp(middle))).sum()) for sides, g in zip(variances, groups, strict=True)
        )
        low, high = (low, middle) if size <= dimensions else (middle, high)
    return float(np.exp(high))


def _basis(
    block: Block, operator: SpectralOperator, sides: Sides, least: float, device: torch.device
) -> BlockBasis | None:
    counts = _counts(sides, least)
    if not counts.any():
        return None
    if operator.sides is None or operator.entrywise:
        weight = operator.weight
        assert weight is not None
        most = int(counts[0])
        return _single(weight, most, device) if operator.entrywise else BlockBasis(weight.topk(most).indices.to(device))
    rows, widest, groups = int((counts > 0).sum()), int(counts.max()), _groups(block, operator)
    columns = [
        _leading(side.values, side.vectors, size) for side, size in zip(operator.sides, (rows, widest), strict=True)
    ]
    taken = torch.arange(widest)[None] < torch.as_tensor(counts[:rows])[:, None]
    index = taken.expand(groups, -1, -1).flatten().nonzero()[:, 0]
    return BlockBasis(index.to(device), (columns[0], columns[1]))


def _single(weight: Tensor, count: int, device: torch.device) -> BlockBasis:
    """The ``count`` single entries of the largest weight [G, O, I]: both sides' columns have one 1 each."""
    groups, *sizes = weight.shape
    group, *both = torch.unravel_index(weight.flatten().topk(count).indices.sort().values, weight.shape)
    sides, places, kept = [], [], torch.ones_like(group, dtype=torch.bool)
    for size, used in zip(sizes, both, strict=True):
        often = used.bincount(minlength=size)
        columns = often.topk(min(int((often > 0).sum()), max(1, MAX_COLUMNS // size))).indices.sort().values
        place = torch.full_like(often, -1)
        place[columns] = torch.arange(len(columns), device=place.device)
        side = torch.zeros(size, len(columns), device=device)
        side[columns.to(device), torch.arange(len(columns), device=device)] = 1.0
        sides.append(side.expand(groups, -1, -1))
        places.append(place[used])
        kept &= place[used] >= 0
    index = (group * sides[0].shape[2] + places[0]) * sides[1].shape[2] + places[1]
    return BlockBasis(index[kept].to(device), (sides[0], sides[1]))


def _leading(values: Tensor, vectors: Tensor | None, size: int) -> Tensor:
    """The eigenvectors [G, K, size] of the largest eigenvalues [G, K]."""
    order = values.argsort(-1, descending=True)[..., :size]
    if vectors is None:
        every = torch.zeros(*values.shape, size, device=values.device, dtype=values.dtype)
        return every.scatter_(1, order[:, None], 1.0)
    return vectors.gather(-1, order[:, None].expand(-1, vectors.shape[1], -1))
