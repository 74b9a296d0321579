"""Contrasts: what a row's shift would be if half of each layer's units counted against it.

Trainings differ in their initial weights. The units of a layer are draws of those, so a row's shift is a sum of as many
random parts, and parts of other signs tell how far the sum scatters: for balanced random signs e over the units o

    shift = sum_o c_o        contrast_j = sum_o e_jo c_o        Var(shift) ~ mean_j contrast_j^2

c_o being the sum over the run, so that what stays the same in one training and changes in the next is counted. The
scatter of a row's own visits cannot show that. The units of the last layer are classes, no draws: there the inputs are
turned. A layer with a single unit has no contrast and adds nothing.

Self-influence is quadratic in the row's gradient: a layer's part is shared out among its units by their squared
gradients.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Outer

CONTRASTS = 4  # four degrees of freedom a row and query, shrunk to those of all rows


class Contrasts:
    """Signs of every block's units.

    Args:
        count: Contrasts J; 0 for none.

    Example:
        >>> signs = Contrasts(4).signs(Block("bias", (torch.nn.Parameter(torch.ones(6)),), (6,)), (6,))
        >>> signs.shape, signs[0].tolist(), signs[1:].sum(1).tolist()
        (torch.Size([5, 6]), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._signs: dict[tuple[Block, tuple[int, ...]], Tensor] = {}

    def signs(self, block: Block, units: tuple[int, ...]) -> Tensor:
        """Ones, then ``count`` rows of balanced signs, [1 + J, units]; the block's place in the model is their seed.

        A weight shared by an embedding and a linear layer has units of two kinds.
        """
        if (block, units) not in self._signs:
            count = math.prod(units)
            # processes and resumed runs, which may meet blocks in another order, draw the same
            generator = torch.Generator().manual_seed(zlib.crc32(f"{block.position} {units}".encode()))
            keys = torch.rand(self.count, count, generator=generator)
            signs = (keys.argsort(1) % 2) * 2.0 - 1.0 if count > 1 else torch.zeros_like(keys)
            parameter = block.parameters[0]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._signs[block, units] = torch.cat([torch.ones(1, count), signs]).to(parameter.device, dtype)
        return self._signs[block, units]

    def of_queries(self, block: Block, grad_sample: GradSample, direction: Tensor) -> Tensor:
        """A layer's part of the signals and their contrasts [b, Q, 1 + J].

        Args:
            block: The layer's block.
            record: Its record.
            direction: Directions U [Q, *layout].
        """
        turned = _by_draws(block, grad_sample)
        direction = direction if turned is grad_sample else direction.transpose(-1, -2)
        return turned.parts(direction, self.signs(block, turned.units).to(direction.dtype))

    def of_self(self, block: Block, grad_samples: Sequence[GradSample]) -> Tensor:
        """Energies [b, 1 + J] of a layer's units, see :func:`signed_by`, added up over the uses of its parameters."""
        turned = [_by_draws(block, grad_sample) for grad_sample in grad_samples]
        parts = [
            grad_sample.energies(self.signs(block, grad_sample.units).to(grad_sample.dtype)) for grad_sample in turned
        ]
        return summed(parts)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def signed_by(energies: Tensor) -> Tensor:
    """Factors [..., 1 + J] that turn a layer's self-influence into itself and its contrasts.

    Args:
        energies: Those of all units and, for each contrast, their signed sums.
    """
    return energies / energies[..., :1].clamp_min(torch.finfo(energies.dtype).tiny)  # no gradient at all: 0 of 0


def _by_draws(block: Block, grad_sample: GradSample) -> GradSample:
    """The record whose units are draws of the initial weights."""
    return grad_sample.transposed() if block.outputs and isinstance(grad_sample, Outer) else grad_sample
