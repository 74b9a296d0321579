"""Gradients of convolutions: linear layers on windows of their input, which are rarely cut out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ine_callback.capture.per_sample_gradients.outer import Outer


@dataclass(frozen=True)
class Kernel:
    """Where the windows of a convolution lie: sizes for each dimension of space, and the groups of channels.

    ``padding`` zeros are on both sides of each dimension; empty: none.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...] = ()

    def view(self, x: Tensor) -> Tensor:
        """Sliding windows of x [b, C, *space], padded, as a view [b, G, *positions, C/G, *size]."""
        if any(self.padding):
            x = F.pad(x, [side for p in reversed(self.padding) for side in (p, p)])
        for d, (k, s, r) in enumerate(zip(self.size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + d, r * (k - 1) + 1, s)[..., ::r]
        grouped: Tensor = x.unflatten(1, (self.groups, -1))  # [b, G, C/G, *positions, *size]
        return grouped.movedim(2, 2 + len(self.size))

    def cut(self, x: Tensor) -> Tensor:
        """Windows of x [b, C, *space] as [b, G, P, C/G * prod(size)], in the order of a convolution's weight."""
        view, space = self.view(x), len(self.size)
        return view.reshape(*view.shape[:2], math.prod(view.shape[2 : 2 + space]), -1)

    def cut_some(self, x: Tensor, positions: slice) -> Tensor:
        """Windows at some positions, [b, G, len, C/G * prod(size)]."""
        view, space = self.view(x), len(self.size)
        sides = view.shape[2 : 2 + space]
        at = torch.arange(math.prod(sides), device=x.device)[positions]
        places: list[Any] = [at // math.prod(sides[d + 1 :]) % side for d, side in enumerate(sides)]
        return view[(slice(None), slice(None), *places)].flatten(3)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A convolution of x with kernels of this size, positions flattened: [b, channels, P]."""
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        found: Tensor = convolution(x, weight, bias, self.stride, self.padding or 0, self.dilation, self.groups)
        return found.flatten(2)


@dataclass(frozen=True)
class Windows(Outer):
    """An :class:`Outer` whose inputs are windows of ``activations``, the image [b, C, *space].

    A product of windows with a basis is a convolution of the image. Windows are larger than the image by the size of
    the kernel, so they are only cut for few rows or positions.
    """

    kernel: Kernel = Kernel((), (), (), 1)

    @property
    def inputs(self) -> int:
        return self.activations.shape[1] // self.kernel.groups * math.prod(self.kernel.size) + self.ones

    @property
    def _inner_first(self) -> bool:
        return True

    def formed(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return self._with_ones(self.kernel.cut(self.activations[rows]))

    def some_inputs(self, positions: slice) -> Tensor:
        return self._with_ones(self.kernel.cut_some(self.activations, positions))

    def projected(self, basis: Tensor) -> Tensor:
        groups, _, width = basis.shape
        basis = basis.to(self.activations.dtype)
        weight, bias = (basis[:, :-1], basis[:, -1].flatten()) if self.ones else (basis, None)
        kernels = weight.transpose(1, 2).reshape(groups * width, -1, *self.kernel.size)
        found: Tensor = self.kernel.convolve(self.activations, kernels, bias).unflatten(1, (groups, width))
        return found.transpose(2, 3)

    def input_squares(self) -> Tensor:
        groups = self.kernel.groups
        squares = self.activations.square().unflatten(1, (groups, -1)).sum(2)
        window = squares.new_ones(groups, 1, *self.kernel.size)
        return self.kernel.convolve(squares, window) + float(self.ones)
