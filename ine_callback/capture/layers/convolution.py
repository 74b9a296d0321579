"""Convolutions: linear layers on windows of their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.attributes import setting
from ine_callback.capture.layers.linear import bias_of
from ine_callback.capture.layers.registry import by_row, register_layer, takes_bfloat16
from ine_callback.capture.per_sample_gradients import GradSample, Kernel, Outer, Vector, Windows


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
@takes_bfloat16
def convolution(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """A linear layer on windows, for each group of channels."""
    activations, output_grads = by_row(activations, rows), by_row(output_grads, rows)
    mode = setting(module, "padding_mode")
    mode = "constant" if mode == "zeros" else mode
    weight = windows(
        activations, output_grads, _kernel(module), setting(module, "_reversed_padding_repeated_twice"), mode
    )
    return {"weight": weight, "bias": bias_of(weight.output_grads)}


def windows(
    activations: Tensor, output_grads: Tensor, kernel: Kernel, padding: Sequence[int], mode: str = "constant"
) -> Windows:
    """A convolution's weight; padding as F.pad takes it."""
    if mode == "constant" and list(padding[::2]) == list(padding[1::2]):  # the image itself: no padded copy
        kernel = replace(kernel, padding=tuple(padding[-2::-2]))
    else:
        activations = F.pad(activations, padding, mode=mode)
    return Windows(activations, _channels_last(output_grads, kernel.groups), kernel=kernel)


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(
    module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int
) -> dict[str, GradSample]:
    """Windows are cut from the output gradient, and the weight's leading dimension is that of the input."""
    activations, output_grads = by_row(activations, rows), by_row(output_grads, rows)
    padding = setting(module, "_reversed_padding_repeated_twice")
    weight = transposed_windows(activations, output_grads, _kernel(module), padding)
    return {"weight": weight, "bias": Vector(output_grads.flatten(2).sum(2))}


def transposed_windows(activations: Tensor, output_grads: Tensor, kernel: Kernel, padding: Sequence[int]) -> Outer:
    """A transposed convolution's weight; padding as F.pad takes it."""
    padded = F.pad(output_grads, padding)
    sizes = zip(activations.shape[2:], kernel.size, kernel.stride, kernel.dilation, strict=True)
    for d, (length, k, s, r) in enumerate(sizes):
        padded = padded.narrow(2 + d, 0, (length - 1) * s + r * (k - 1) + 1)  # output padding has no window
    return Outer(kernel.cut(padded), _channels_last(activations, kernel.groups))


def _kernel(module: nn.Module) -> Kernel:
    return Kernel(*(setting(module, name) for name in ("kernel_size", "stride", "dilation", "groups")))


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """x [b, C, *space] as [b, G, P, C/G]."""
    grouped: Tensor = x.flatten(2).unflatten(1, (groups, -1))
    return grouped.transpose(2, 3)
