"""Contrasts: what a row's shift would be if half of each layer's units counted against it.

Trainings differ in their initial weights. The units of a layer are draws of those, so a row's shift is a sum of as many
random parts, and parts of other signs tell how far the sum scatters: for balanced random signs e over the units o

    shift = sum_o c_o        contrast_j = sum_o e_jo c_o        Var(shift) ~ mean_j contrast_j^2

c_o being the sum over the run, so that what stays the same in one training and changes in the next is counted. The
scatter of a row's own visits cannot show that. A layer with a single unit has no contrast and adds nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ine_callback.capture import Block, Record

CONTRASTS = 4  # four degrees of freedom a row and query, shrunk to those of all rows


class Contrasts:
    """Signs of every block's units.

    Args:
        count: Contrasts J; 0 for none.

    Example:
        >>> from ine_callback.capture.records import Vector
        >>> record = Vector(torch.ones(2, 6))
        >>> signs = Contrasts(4).signs(Block("bias", (torch.nn.Parameter(torch.ones(6)),), (6,)), record)
        >>> signs.shape, signs[0].tolist(), signs[1:].sum(1).tolist()
        (torch.Size([5, 6]), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._generator = torch.Generator().manual_seed(0)
        self._signs: dict[tuple[Block, tuple[int, ...]], Tensor] = {}

    def signs(self, block: Block, record: Record) -> Tensor:
        """Ones, then ``count`` rows of balanced signs, [1 + J, units]; drawn once for each block.

        A weight shared by an embedding and a linear layer has units of two kinds.
        """
        key = block, record.units
        if key not in self._signs:
            units = math.prod(record.units)
            keys = torch.rand(self.count, units, generator=self._generator)
            signs = (keys.argsort(1) % 2) * 2.0 - 1.0 if units > 1 else torch.zeros_like(keys)
            self._signs[key] = torch.cat([torch.ones(1, units), signs]).to(block.parameters[0].device)
        return self._signs[key]
