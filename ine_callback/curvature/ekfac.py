r"""EK-FAC: the exact diagonal of every block's Fisher in a Kronecker eigenbasis (arXiv 1806.03884).

Let ``Q = Q_L ⊗ Q_R`` be the eigenvectors of a block's Kronecker factors (:mod:`.kfac`). Instead of the products of the
factors' eigenvalues, the Fisher's own diagonal in that basis,

    Lambda_jk = mean over rows of (Q_L^T g Q_R)_jk^2,

with a row's gradient g summed over its positions before it is squared. That holds for any orthonormal basis, so factors
of another time serve as well. In the Frobenius norm no other diagonal in that basis is nearer to the Fisher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Outer
from ine_callback.capture.per_sample_gradients import row_chunks
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.low_rank import Side
from ine_callback.curvature.spectral import SpectralOperator, Spectrum


class EKFAC:
    """The diagonal of every block's Fisher in the eigenbasis of its Kronecker factors.

    Args:
        basis: The Kronecker factors; None: the Fisher's own diagonal, in no basis.
        rows: Number of rows N that the Fisher is the mean of.

    Example:
        >>> import torch
        >>> from ine_callback.capture import Block, Outer
        >>> from ine_callback.curvature.spectral import resolvent
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> block, ekfac = Block("w", (weight,), (1, 1, 2)), EKFAC(None, rows=2)
        >>> gradients = Outer(torch.tensor([[[[1.0, 0.0]]], [[[0.0, 2.0]]]]), torch.ones(2, 1, 1, 1))
        >>> ekfac.observe(block, [gradients], torch.ones(2))
        >>> ekfac.eigenvalues(block), ekfac.operator(block, resolvent(0.5)).weight
        (tensor([[[0.5000, 2.0000]]]), tensor([[[1.0000, 0.4000]]]))
    """

    def __init__(self, basis: KFAC | None, rows: int) -> None:
        self._basis, self._rows = basis, rows
        self._vectors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._sums: dict[str, Tensor] = {}

    def observe(self, block: Block, grad_samples: Sequence[GradSample], scale: Tensor) -> None:
        """Adds a batch's rows.

        Args:
            block: The block.
            grad_samples: Its uses in the batch, which add up to the rows' gradients.
            scale: What makes them rows f of the Fisher [b], which is ``sum f f^T / N`` over all batches.
        """
        left, right = self._bases(block, grad_samples[0].wide())
        rotated = [one.wide().rotated(left, right) for one in grad_samples]
        found = _squares(rotated, scale.to(rotated[0].dtype))
        self._sums[block.name] = found if block.name not in self._sums else self._sums[block.name] + found

    def _bases(self, block: Block, like: GradSample) -> tuple[Tensor | None, Tensor | None]:
        if block.name not in self._vectors:
            both = (None, None) if self._basis is None or len(block.layout) == 1 else self._basis.eigenvectors(block)
            left, right = (None if x is None else x.to(like.dtype) for x in both)
            left = None if block.tied else left  # a lookup's rows cannot be rotated
            self._vectors[block.name] = left, right
        return self._vectors[block.name]

    def eigenvalues(self, block: Block) -> Tensor:
        """The diagonal Lambda [*layout]."""
        return self._sums[block.name] / self._rows

    def operator(self, block: Block, spectrum: Spectrum) -> SpectralOperator:
        """A function of the block's Fisher; the identity for a block that was never observed."""
        if block.name not in self._sums:
            return SpectralOperator()
        values, (left, right) = self.eigenvalues(block), self._vectors[block.name]
        if len(block.layout) == 1:
            return SpectralOperator(spectrum(values))
        return SpectralOperator(spectrum(values), (Side(values.sum(-1), left), Side(values.sum(-2), right)))


def _squares(rotated: Sequence[GradSample], scale: Tensor) -> Tensor:
    """Sum over rows of the squared gradients [*layout], a row's uses added up first."""
    first = rotated[0]
    if len(rotated) == 1 and isinstance(first, Outer) and first.positions == 1:
        output_grads = first.output_grads[:, :, 0] * scale[:, None, None]
        return torch.einsum("bgo,bgi->goi", output_grads.square(), first.formed()[:, :, 0].square())
    total = scale.new_zeros(first.layout)
    for rows in row_chunks(first.rows, total.numel()):
        gradient = first.gradient(rows)
        for other in rotated[1:]:
            gradient = gradient + other.gradient(rows)
        total += (gradient * scale[rows].view(-1, *[1] * total.dim())).square_().sum(0)
    return total
