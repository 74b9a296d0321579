"""Gradients of some rows, stored whole or as factors, whichever is smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.capture import GradSample, Outer, Vector

FORMED = 16  # rows whose gradients are formed at once


@dataclass
class StoredGradients:
    """Gradients of n rows, whole (``right`` [n, *layout]) or as ``left right^T`` (left [n, G, O], right [n, G, I])."""

    left: Tensor | None
    right: Tensor

    @property
    def elements(self) -> int:
        return self.right.numel() + (0 if self.left is None else self.left.numel())

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredGradients:
        return StoredGradients(None if self.left is None else change(self.left), change(self.right))

    def gram(self, other: StoredGradients) -> Tensor:
        """Inner products [n, m]."""
        if self.left is None or other.left is None:
            return self.right.flatten(1) @ other.right.flatten(1).T
        return (_inner(self.left, other.left) * _inner(self.right, other.right)).sum(0)

    def products(self, v: Tensor) -> Tensor:
        """Inner products [n, Q] with v [Q, *layout]."""
        if self.left is None:
            return self.right.flatten(1) @ v.flatten(1).T
        return Outer(self.right[:, :, None], self.left[:, :, None]).signals(v)

    def part(self, start: int) -> StoredGradients:
        """Some rows from ``start`` on: few enough to be formed."""
        return self.map(lambda x: x[start : start + FORMED])

    def formed(self) -> Tensor:
        """The gradients [n, *layout]."""
        if self.left is None:
            return self.right
        return self.left[..., :, None] * self.right[..., None, :]

    def combined(self, coefficients: Tensor) -> Tensor:
        """Sums of the gradients with coefficients [n, Q], as [Q, *layout]."""
        if self.left is None:
            return torch.einsum("nq,n...->q...", coefficients, self.right)
        weighted = torch.einsum("nq,ngo->qgon", coefficients, self.left)
        return weighted @ self.right.transpose(0, 1)


def quarters(x: Tensor, quarter: int, which: slice) -> Tensor:
    """Some rows of every four rows."""
    return x[: 4 * quarter].view(quarter, 4, *x.shape[1:])[:, which].flatten(0, 1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products [G, n, m] of x [n, G, K] and y [m, G, K]."""
    return x.transpose(0, 1) @ y.permute(1, 2, 0)


def to_store(grad_sample: GradSample, rows: Tensor | slice, scale: Tensor | float = 1.0) -> StoredGradients:
    """Gradients of chosen rows, summed over positions, in float32; as factors where there is one position."""
    if isinstance(grad_sample, Outer) and grad_sample.positions is None:
        return StoredGradients(None, grad_sample.wide().gradient(rows).float() * scale)
    if isinstance(grad_sample, Outer):
        activations, output_grads = grad_sample.formed(rows).float(), grad_sample.output_grads[rows].float() * scale
        if activations.shape[2] == 1:
            return StoredGradients(output_grads[:, :, 0], activations[:, :, 0])
        return StoredGradients(None, output_grads.transpose(-1, -2) @ activations)
    assert isinstance(grad_sample, Vector)
    return StoredGradients(None, grad_sample.g[rows].float() * scale)
