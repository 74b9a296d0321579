r"""Functions of a block's curvature: one eigenbasis, any spectrum.

The Fisher F of a block has Kronecker factors, so a function of it is elementwise in their eigenbasis:

    f(F) v = Q_L [f(l_L l_R^T) * (Q_L^T v Q_R)] Q_R^T

    f(x) = exp(-(R x + decay))          what the rest of training leaves of a change made now: f-INE's discount
    f(x) = 1 / (x + damping)            an influence function
    f(x) = (1 - (1 - rate x)^T) / x     T steps of gradient descent, unrolled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ine_callback.capture.per_sample_gradients import GradSample, row_chunks
from ine_callback.curvature.low_rank import Side
from ine_callback.curvature.sketch import MIN_MIXTURES, Sketch, expected_self_influence, sketched

# f of eigenvalues, given as factors to be multiplied: the large product is then formed once, by f itself.
Spectrum = Callable[..., Tensor]


def exponential(exponent: Tensor | float, decay: Tensor | float = 0.0) -> Spectrum:
    """``exp(-(exponent x + decay))``.

    Args:
        exponent: R: the learning rate that remains times the optimizer's rate.
        decay: The exponent of weight decay, the same in all directions.

    Example:
        >>> exponential(2.0)(torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.3679])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        return torch.exp(-(torch.as_tensor(math.prod(factors, start=exponent)) + decay))

    return spectrum


def resolvent(damping: float) -> Spectrum:
    """``1 / (x + damping)``.

    Example:
        >>> resolvent(0.5)(torch.tensor([0.0, 1.5]))
        tensor([2.0000, 0.5000])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        return 1 / (identity(*factors) + damping)

    return spectrum


def damped(exponent: Tensor | float, decay: Tensor | float = 0.0) -> Spectrum:
    """``1 / (1 + exponent x + decay)``: a resolvent with damping 1 / exponent, times the exponent.

    Args:
        exponent: R: the summed learning rate of a run times the optimizer's rate.
        decay: The exponent of weight decay, the same in all directions.

    Example:
        >>> damped(2.0)(torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.5000])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        return 1 / (1 + torch.as_tensor(math.prod(factors, start=exponent)) + decay)

    return spectrum


def identity(*factors: Tensor) -> Tensor:
    """The eigenvalues themselves: the operator is the Fisher."""
    return math.prod(factors[1:], start=factors[0])


def relative(damping: float) -> Spectrum:
    """``1 / (x + damping mean(x))``, with the mean over the block's eigenvalues.

    Example:
        >>> relative(0.5)(torch.tensor([0.0, 2.0]))
        tensor([2.0000, 0.4000])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        x = identity(*factors)
        return 1 / (x + damping * x.mean().clamp_min(torch.finfo(x.dtype).tiny))

    return spectrum


def unrolled(rate: float, steps: int) -> Spectrum:
    """``(1 - (1 - rate x)^steps) / x``, and its limit ``rate steps`` where x is 0.

    Example:
        >>> unrolled(0.5, 2)(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.7500])
    """

    def spectrum(*factors: Tensor) -> Tensor:
        x = identity(*factors)
        return torch.where(x > 0, (1 - (1 - rate * x) ** steps) / x.clamp_min(torch.finfo(x.dtype).tiny), rate * steps)

    return spectrum


@dataclass(frozen=True)
class SpectralOperator:
    """The linear map f(F) of one block: rotate into the eigenbasis of its Fisher F, weight, rotate back.

    Attributes:
        formed: f of the eigenvalues [*layout], or what forms it: it is as large as the block. None: the identity.
        sides: The covariances that it comes from, left and right, where the block is a matrix with both.
        entrywise: Whether the weight is that of single entries of the block instead.
    """

    formed: Tensor | Callable[[], Tensor] | None = None
    sides: tuple[Side, Side] | None = None
    entrywise: bool = False

    @property
    def weight(self) -> Tensor | None:
        """f of the eigenvalues [*layout], formed anew unless it is held; None: the identity."""
        return self.formed() if callable(self.formed) else self.formed

    def held(self) -> SpectralOperator:
        """The same map with its weight formed, for what applies it again and again."""
        return replace(self, formed=self.weight)

    @property
    def left(self) -> Tensor | None:
        """Eigenvectors of the output side [G, O, O], or None where nothing is rotated."""
        return None if self.sides is None or self.entrywise else self.sides[0].vectors

    @property
    def right(self) -> Tensor | None:
        """Eigenvectors of the input side [G, I, I], or None where nothing is rotated."""
        return None if self.sides is None or self.entrywise else self.sides[1].vectors

    def apply(self, v: Tensor) -> Tensor:
        """f(F) v for v [Q, *layout]."""
        weight = self.weight
        if weight is None:
            return v
        if self.left is not None:
            v = self.left.transpose(-1, -2) @ v
        if self.right is not None:
            v = v @ self.right
        v = v * weight
        if self.right is not None:
            v = v @ self.right.transpose(-1, -2)
        return v if self.left is None else self.left @ v

    def quadratic(self, grad_sample: GradSample) -> Tensor:
        """<f(F) g_i, g_i> [b] for every row."""
        return self.norms(grad_sample)[:, 0]

    def norms(self, grad_sample: GradSample) -> Tensor:
        """<f(F) g_i, g_i> and |f(F) g_i|^2, [b, 2], for every row."""
        weight = self.weight
        if weight is None:
            return grad_sample.squared_norms()[:, None].expand(-1, 2)
        return grad_sample.rotated(self.left, self.right).norms(torch.stack([weight, weight.square()]))

    def expected_self_influence(self) -> Tensor | None:
        """See :func:`.sketch.expected_self_influence`; None without sides, which are never sketched."""
        if self.sides is None or self.formed is None:
            return None
        return expected_self_influence(self._rotated(), *self.sides)

    def sketched(self, mixtures: int = MIN_MIXTURES) -> SketchedOperator | SpectralOperator:
        """Nearly the same :meth:`norms` by few columns, see :mod:`.sketch`; the operator itself without sides."""
        if self.sides is None or self.formed is None:
            return self
        rows, columns, weights = sketched(self._rotated(), *self.sides, mixtures)
        return SketchedOperator(rows, columns, self.sides[0].vectors, self.sides[1].vectors, weights)

    def _rotated(self) -> Tensor:
        """The weights in the sides' eigenbases; for an entrywise operator its diagonal there."""
        weight = self.weight
        assert self.sides is not None and weight is not None
        left, right = (side.vectors for side in self.sides)
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
            applied = self.apply(g)
            out.append(torch.stack([(applied * g).flatten(1).sum(1), applied.flatten(1).square().sum(1)], 1))
        return torch.cat(out)


@dataclass
class SketchedOperator:
    """A :class:`SpectralOperator` approximated by few columns, for :meth:`norms` alone.

    Attributes:
        rows: Sketch of the output side, or None.
        columns: Sketch of the input side, or None.
        left: Columns of the output side as drawn last [G, O, n].
        right: Columns of the input side as drawn last [G, I, m].
        weights: Weights of the squares in these columns [2, G, n, m], for ``<f(F) g, g>`` and for ``|f(F) g|^2``.
    """

    rows: Sketch | None
    columns: Sketch | None
    left: Tensor | None
    right: Tensor | None
    weights: Tensor

    def transposed(self) -> SketchedOperator:
        """The same operator for transposed gradients."""
        return SketchedOperator(self.columns, self.rows, self.right, self.left, self.weights.transpose(-1, -2))

    @property
    def weights_and_halves(self) -> Tensor:
        """The weights, then both with the halves of the left and of the right mixtures subtracted [6, G, n, m]."""
        none = torch.zeros_like(self.weights)
        left = none if self.rows is None else self.weights * self.rows.halves[:, None]
        right = none if self.columns is None else self.weights * self.columns.halves
        return torch.cat([self.weights, left, right])

    @property
    def has_columns(self) -> bool:
        """Whether the input side has columns; a diagonal covariance of few dimensions has none."""
        return self.columns is not None or self.right is not None

    def draw(self, generator: torch.Generator) -> None:
        """Draws new mixtures, so that a row's errors average out over the steps."""
        self.left = self.left if self.rows is None else self.rows.draw(generator)
        self.right = self.right if self.columns is None else self.columns.draw(generator)

    def norms(self, grad_sample: GradSample) -> Tensor:
        """See :meth:`SpectralOperator.norms`."""
        return grad_sample.rotated(self.left, self.right).norms(self.weights)
