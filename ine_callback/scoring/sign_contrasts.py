"""Rademacher sign contrasts: a row's shift with the signs of half of each layer's units reversed.

They measure how far a row's shift scatters between trainings with other initial weights. The units of a layer are
independent draws of the initial weights, so the shift is a sum of random parts c_o, one for each unit o. Sums with
balanced random signs e tell how far it scatters:

    shift = sum_o c_o        contrast_j = sum_o e_jo c_o        Var(shift) ~ mean_j contrast_j^2

c_o is the sum over the run, so this counts what is constant within one training and different in the next. The scatter
of a row's observations within one run cannot show that. The units of the last layer are classes, not draws of the
initial weights: there the inputs are signed. A layer with a single unit has no contrast and adds nothing.

Self-influence is quadratic in the row's gradient: a layer's part is divided among its units in proportion to their
squared gradients, the unit energies.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Outer

CONTRASTS = 4  # degrees of freedom for each row and query; variances are shrunk towards those of all rows


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
        """Ones, then J rows of balanced signs, [1 + J, units]; the block's place in the model is their seed.

        A weight tied between an embedding and a linear layer has units of two kinds.
        """
        if (block, units) not in self._signs:
            count = math.prod(units)
            # the same signs in all processes and in resumed runs, whatever the order of the blocks
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
            grad_sample: Its per-sample gradients.
            direction: Directions U [Q, *layout].
        """
        by_unit = _by_initial_unit(block, grad_sample)
        direction = direction if by_unit is grad_sample else direction.transpose(-1, -2)
        return by_unit.parts(direction, self.signs(block, by_unit.units).to(direction.dtype))

    def of_self(self, block: Block, grad_samples: Sequence[GradSample]) -> Tensor:
        """Unit energies [b, 1 + J] of a layer, see :func:`signed_by`, summed over the uses of its parameters."""
        by_unit = [_by_initial_unit(block, grad_sample) for grad_sample in grad_samples]
        parts = [use.unit_energies(self.signs(block, use.units).to(use.dtype)) for use in by_unit]
        return summed(parts)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape; a single tensor is not copied."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def signed_by(unit_energies: Tensor) -> Tensor:
    """Factors [..., 1 + J] that make of a layer's self-influence itself and its contrasts.

    Args:
        unit_energies: The sum over all units and, for each contrast, their signed sum [..., 1 + J].
    """
    total = unit_energies[..., :1].clamp_min(torch.finfo(unit_energies.dtype).tiny)  # without any gradient: 0 of 0
    return unit_energies / total


def _by_initial_unit(block: Block, grad_sample: GradSample) -> GradSample:
    """The per-sample gradients, transposed if need be so that their units are draws of the initial weights."""
    return grad_sample.transposed() if block.outputs and isinstance(grad_sample, Outer) else grad_sample
