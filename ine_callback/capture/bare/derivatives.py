"""Weights in the derivative of their layer, where a loss holds a gradient (``create_graph=True``).

A layer y = A(x, w) that is linear in w turns an output gradient d into the input gradient g = (dA/dx)^T d. A penalty
on g gives that a gradient v, and ``<v, g> = <d, (dA/dx) v>``. So its gradient by w is that of the layer with the output
gradient d, where the activations' derivative along v has taken the activations' place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.bare.layouts import RowLayout
from ine_callback.capture.layers.convolution import transposed_windows, windows
from ine_callback.capture.per_sample_gradients import GradSample, Kernel, Vector, widened

# of the node, v, where the rows are in it, their number, and the weight's shape
Derivative = Callable[[Any, Tensor, RowLayout, int, torch.Size], GradSample]


def _convolution(node: Any, v: Tensor, layout: RowLayout, rows: int, shape: torch.Size) -> GradSample:
    """A convolution is its own derivative."""
    kernel = Kernel(tuple(shape[2:]), tuple(node._saved_stride), tuple(node._saved_dilation), node._saved_groups)
    padding = [side for p in reversed(node._saved_padding) for side in (p, p)]
    output_grads = widened(node._saved_grad_output)
    make = transposed_windows if node._saved_transposed else windows
    return make(widened(v), output_grads, kernel, padding)


def _layer_norm(node: Any, v: Tensor, layout: RowLayout, rows: int, shape: torch.Size) -> GradSample:
    """The normed input's derivative: v without its parts along ones and along the normed input, over the deviation."""
    dims, rstd = tuple(range(-len(shape), 0)), widened(node._saved_rstd)
    normed, v = (widened(node._saved_input) - widened(node._saved_mean)) * rstd, widened(v)
    derivative = (v - v.mean(dims, keepdim=True) - normed * (normed * v).mean(dims, keepdim=True)) * rstd
    scale = derivative * widened(node._saved_grad_out)
    return Vector(layout.summed(scale, rows, shape).reshape(rows, -1))


# by the operation's name: the weight's place among its inputs, and the gradients; linear layers are matrix products
DERIVATIVES: dict[str, tuple[int, Derivative]] = {
    "ConvolutionBackwardBackward0": (2, _convolution),
    "NativeLayerNormBackwardBackward0": (4, _layer_norm),
}
ENTRIES_ALONE = {"ConvolutionBackwardBackward0"}  # which take no several entries of a row
