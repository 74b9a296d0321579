r"""Coordinates of gradients: few entries in the eigenbasis of each layer's curvature, of all layers together.

A layer's gradient G [O, I] has the entries ``l_a^T G r_b`` between eigenvectors of K-FAC's factors. In the Fisher each
has the variance ``lambda_a rho_b``, the product of the eigenvalues. Those with the largest variance, times what the
optimizer moves the layer by, are taken: of all layers together as many as asked for. In scores the leading directions
of the curvature count most even after the discount, which bounds their part and does not reverse it (Spearman with the
uncompressed scores on G1: .97 with 1024 of 1962 entries, .49 with 1024 Rademacher projections).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        if grad_sample.positions == 1:  # one product for each entry: the rectangle may be many times larger
            of_left, of_right = self._pairs
            return output_grads.flatten(1)[:, of_left] * inputs.flatten(1)[:, of_right]
        return _between(grad_sample, output_grads, inputs).flatten(1)[:, self.index]

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
        return rows.between(left, right).flatten(1)[:, self.index]

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
        shapes = [(s[0].shape[0], s[0].shape[2], s[1].shape[2]) for s in (before.sides, self.sides)]
        full = self.sides[0].new_zeros(len(x), int(np.prod(shapes[0])))
        full[:, before.index] = x.to(full)
        left, right = (new.transpose(-1, -2) @ old for new, old in zip(self.sides, before.sides, strict=True))
        return (left @ full.view(-1, *shapes[0]) @ right.transpose(-1, -2)).flatten(1)[:, self.index].to(x)


def _projected(grad_sample: Outer, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Output gradients [b, G, P, k] and inputs [b, G, P, l] on columns; they are widened when they are small."""
    inputs = widened(grad_sample.projected(right))
    output_grads = widened(grad_sample.output_grads @ left.to(grad_sample.output_grads.dtype))
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
    blocks: Mapping[Block, Tensor | float], kfac: KFAC, dimensions: int, device: torch.device
) -> dict[Block, BlockBasis]:
    """The entries of the largest variance, at most ``dimensions``, of all blocks that the curvature knows.

    Args:
        blocks: What the optimizer multiplies each block's gradients with.
        kfac: The curvature.
        dimensions: Most entries.
        device: Where the bases live.
    """
    operators = {block: kfac.operator(block, identity) for block in blocks}
    known = {block: one for block, one in operators.items() if one.formed is not None}
    variances = [_variances(block, one, float(blocks[block])) for block, one in known.items()]
    least = _threshold(variances, [_groups(block) for block in known], dimensions)
    found = {}
    for (block, one), sides in zip(known.items(), variances, strict=True):
        basis = _basis(block, one, sides, least, device)
        if basis is not None:
            found[block] = basis
    return found


Sides = tuple[NDArray[np.float64], NDArray[np.float64]]  # descending, of the left and the right side


def _variances(block: Block, operator: SpectralOperator, rate: float) -> Sides:
    """Eigenvalues of both sides, means over the groups; a vector's are on the right. Their products are variances."""
    if operator.sides is None:
        assert operator.weight is not None
        values = operator.weight.double().cpu().numpy() * rate**2
        return np.ones(1), np.sort(values)[::-1]
    left, right = (side.values.double().sort(-1, descending=True).values.mean(0).cpu() for side in operator.sides)
    return left.numpy() * rate**2, right.numpy()


def _groups(block: Block) -> int:
    return block.layout[0] if len(block.layout) == 3 else 1


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
    if operator.sides is None:
        assert operator.weight is not None
        return BlockBasis(operator.weight.argsort(descending=True)[: int(counts[0])].to(device))
    rows, widest, groups = int((counts > 0).sum()), int(counts.max()), _groups(block)
    columns = [
        _leading(side.values, side.vectors, size) for side, size in zip(operator.sides, (rows, widest), strict=True)
    ]
    taken = torch.arange(widest)[None] < torch.as_tensor(counts[:rows])[:, None]
    index = taken.expand(groups, -1, -1).flatten().nonzero()[:, 0]
    return BlockBasis(index.to(device), (columns[0], columns[1]))


def _leading(values: Tensor, vectors: Tensor | None, size: int) -> Tensor:
    """The eigenvectors [G, K, size] of the largest eigenvalues [G, K]."""
    order = values.argsort(-1, descending=True)[..., :size]
    if vectors is None:
        every = torch.zeros(*values.shape, size, device=values.device, dtype=values.dtype)
        return every.scatter_(1, order[:, None], 1.0)
    return vectors.gather(-1, order[:, None].expand(-1, vectors.shape[1], -1))
