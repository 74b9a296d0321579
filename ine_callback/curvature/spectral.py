r"""Functions of a block's curvature: one eigenbasis, any spectrum.

The Fisher F of a block has Kronecker factors, so a function of it is elementwise in their eigenbasis:

    f(F) v = Q_L [f(l_L l_R^T) * (Q_L^T v Q_R)] Q_R^T

    f(x) = exp(-(R x + decay))          what the rest of training leaves of a change: f-INE's discount
    f(x) = 1 / (x + damping)            an influence function
    f(x) = (1 - (1 - rate x)^T) / x     T steps of gradient descent, unrolled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ine_callback.capture.per_sample_gradients import GradSample, row_chunks
from ine_callback.curvature.low_rank import MIXED, Side, Sketch, energies, sketched

# f of eigenvalues that come as factors to be multiplied: large products are then formed once, by f itself.
Spectrum = Callable[..., Tensor]


def exponential(exponent: Tensor | float, decay: Tensor | float = 0.0) -> Spectrum:
    """``exp(-(exponent x + decay))``.

    Args:
        exponent: Remaining learning rate times the optimizer's rate R.
        decay: Weight decay's own exponent (the same in all directions).

    Example:
        >>> exponential(2.0)(torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.3679])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        product = exponent
        for factor in factors:
            product = product * factor
        return torch.exp(-(torch.as_tensor(product) + decay))

    return spectrum


def resolvent(damping: float) -> Spectrum:
    """``1 / (x + damping)``.

    Example:
        >>> resolvent(0.5)(torch.tensor([0.0, 1.5]))
        tensor([2.0000, 0.5000])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        return 1 / (math.prod(factors[1:], start=factors[0]) + damping)

    return spectrum


def unrolled(rate: float, steps: int) -> Spectrum:
    """``(1 - (1 - rate x)^steps) / x``, and its limit ``rate steps`` where x is 0.

    Example:
        >>> unrolled(0.5, 2)(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.7500])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        x = math.prod(factors[1:], start=factors[0])
        return torch.where(x > 0, (1 - (1 - rate * x) ** steps) / x.clamp_min(torch.finfo(x.dtype).tiny), rate * steps)

    return spectrum


@dataclass(frozen=True)
class SpectralOperator:
    """The linear map f(F) of one block: rotate into the eigenbasis of its Fisher F, weight, rotate back.

    Attributes:
        weight: f of the eigenvalues [*layout]; None: the identity.
        sides: The moments that it comes from, left and right, where the block is a matrix with both.
        entrywise: Whether the weight is that of single entries of the block instead.
    """

    weight: Tensor | None = None
    sides: tuple[Side, Side] | None = None
    entrywise: bool = False

    @property
    def left(self) -> Tensor | None:
        """Eigenvectors of the output side [G, O, O], or None where nothing is turned."""
        return None if self.sides is None or self.entrywise else self.sides[0].vectors

    @property
    def right(self) -> Tensor | None:
        """Eigenvectors of the input side [G, I, I], or None where nothing is turned."""
        return None if self.sides is None or self.entrywise else self.sides[1].vectors

    def apply(self, v: Tensor) -> Tensor:
        """f(F) v for v [Q, *layout]."""
        if self.weight is None:
            return v
        if self.left is not None:
            v = self.left.transpose(-1, -2) @ v
        if self.right is not None:
            v = v @ self.right
        v = v * self.weight
        if self.right is not None:
            v = v @ self.right.transpose(-1, -2)
        return v if self.left is None else self.left @ v

    def quadratic(self, grad_sample: GradSample) -> Tensor:
        """<f(F) g_i, g_i> [b] for every row of a record."""
        return self.norms(grad_sample)[:, 0]

    def norms(self, grad_sample: GradSample) -> Tensor:
        """<f(F) g_i, g_i> and |f(F) g_i|^2, [b, 2], for every row of a record."""
        if self.weight is None:
            return grad_sample.squared_norms()[:, None].expand(-1, 2)
        return grad_sample.rotated(self.left, self.right).norms(torch.stack([self.weight, self.weight.square()]))

    def energies(self) -> Tensor | None:
        """See :func:`.low_rank.energies`; None without sides, for such an operator is met as it is."""
        return None if self.sides is None or self.weight is None else energies(self._turned, *self.sides)

    def sketched(self, mixed: int = MIXED) -> Sketched | SpectralOperator:
        """Nearly the same :meth:`norms` by few columns, see :mod:`.low_rank`; of a vector itself."""
        if self.sides is None or self.weight is None:
            return self
        rows, columns, weights = sketched(self._turned, *self.sides, mixed)
        return Sketched(rows, columns, self.sides[0].vectors, self.sides[1].vectors, weights)

    @cached_property
    def _turned(self) -> Tensor:
        """The weights in the sides' eigenbases; of an entrywise operator its diagonal there."""
        assert self.sides is not None and self.weight is not None
        weight, (left, right) = self.weight, (side.vectors for side in self.sides)
        if self.entrywise and left is not None:
            weight = left.square().transpose(-1, -2) @ weight
        return weight @ right.square() if self.entrywise and right is not None else weight

    def norms_of_sum(self, grad_samples: Sequence[GradSample]) -> Tensor:
        """<f(F) g_i, g_i> and |f(F) g_i|^2, [b, 2], where g_i is the sum over several uses of the same parameters."""
        out = []
        elements = int(torch.Size(grad_samples[0].layout).numel())
        for rows in row_chunks(grad_samples[0].rows, elements):
            g = grad_samples[0].gradient(rows)
            for grad_sample in grad_samples[1:]:
                g = g + grad_sample.gradient(rows)
            changed = self.apply(g)
            out.append(torch.stack([(changed * g).flatten(1).sum(1), changed.flatten(1).square().sum(1)], 1))
        return torch.cat(out)


@dataclass
class Sketched:
    """An operator for :meth:`norms` alone, by few columns.

    Attributes:
        rows: Sketch of the output side, or None.
        columns: Sketch of the input side, or None.
        left: Columns of the output side as drawn last [G, O, n].
        right: Columns of the input side as drawn last [G, I, m].
        weights: Of the squares in these columns [2, G, n, m], for ``<f(F) g, g>`` and for ``|f(F) g|^2``.
    """

    rows: Sketch | None
    columns: Sketch | None
    left: Tensor | None
    right: Tensor | None
    weights: Tensor

    def transposed(self) -> Sketched:
        """The same of transposed gradients."""
        return Sketched(self.columns, self.rows, self.right, self.left, self.weights.transpose(-1, -2))

    @property
    def has_columns(self) -> bool:
        """Whether the input side has columns; a diagonal moment of few dimensions has none."""
        return self.columns is not None or self.right is not None

    def draw(self, generator: torch.Generator) -> None:
        """Draws new columns: errors of rows met at several steps average out."""
        self.left = self.left if self.rows is None else self.rows.draw(generator)
        self.right = self.right if self.columns is None else self.columns.draw(generator)

    def norms(self, grad_sample: GradSample) -> Tensor:
        """See :meth:`SpectralOperator.norms`."""
        return grad_sample.rotated(self.left, self.right).norms(self.weights)
