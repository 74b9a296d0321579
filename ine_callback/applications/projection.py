"""Modules that leave directions out of features, from arrays of a report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ine_callback.scores import Floats


class Projection(nn.Module):
    """x − ((x − μ) R) Lᵀ for features x [b, p]: what R reads is taken out along L. With RᵀL = I it is a projection.

    Args:
        mean: μ [p].
        removed: L [p, d].
        read: R [p, d].

    Example:
        >>> import numpy as np
        >>> module = Projection(np.array([1.0, 1.0]), np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]))
        >>> module(torch.tensor([[5.0, 2.0]]))
        tensor([[1., 2.]])
    """

    mean: Tensor
    removed: Tensor
    read: Tensor

    def __init__(self, mean: Floats, removed: Floats, read: Floats) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("removed", removed), ("read", read)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return x - ((x - self.mean) @ self.read) @ self.removed.T


def linear(coefficients: Floats) -> nn.Linear:
    """A linear layer with coefficients [C, 1 + p], the biases first."""
    wide = torch.tensor(coefficients, dtype=torch.get_default_dtype())
    layer = nn.Linear(wide.shape[1] - 1, len(wide))
    with torch.no_grad():
        layer.weight.copy_(wide[:, 1:])
        layer.bias.copy_(wide[:, 0])
    return layer
