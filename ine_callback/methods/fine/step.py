"""What f-INE makes of one step's signals: arithmetic on small tensors, which the sums of the rows then take up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ine_callback.utilities.fused import Fused

MAX_SIGNAL = 1e15  # |rate x signal| beyond it would overflow a float32 square: counted as non-finite


class Step(NamedTuple):
    """One step of b rows and Q queries.

    Attributes:
        d: Shifts of the queries if a row is drawn rather than one of its batch-mates [b, Q].
        z: The same in units of their deviation [b, Q].
        variance: Their variance [Q].
        noise: Variance of the queries' changes over the draw of the batch [Q].
        total: Predicted decrease of the queries [Q].
        level: Absolute mean of self-influence, which its shifts are measured in [Q]; 0 for other queries.
        lost: How many signals were not finite [Q].
        contrasts: Shifts with signs on the layers' units [b, Q, J].
        halves: Differences between halves of the sketches [b, Q, H].
    """

    d: Tensor
    z: Tensor
    variance: Tensor
    noise: Tensor
    total: Tensor
    level: Tensor
    lost: Tensor
    contrasts: Tensor | None
    halves: Tensor | None


@Fused
def step_of(signals: Tensor, factor: Tensor, of_self: Tensor, contrasts: Tensor | None, halves: Tensor | None) -> Step:
    """A step's shifts.

    Args:
        signals: Signals [b, Q] of at least two rows.
        factor: The rate over the queries' units [b, Q].
        of_self: Which queries are self-influence [Q].
        contrasts: The signals with signs on the layers' units [b, Q, J].
        halves: Differences between halves of the sketches [b, Q, H].
    """
    rows = signals.shape[0]
    predicted = signals.to(torch.float32) * factor
    usable = predicted.abs() < MAX_SIGNAL  # False for NaN and infinities too
    finite = usable.sum(0)
    predicted = torch.where(usable, predicted, 0.0)
    count, others = finite.clamp(min=1), (finite - 1).clamp(min=1)
    total = predicted.sum(0)
    mean = total / count
    d = torch.where(usable, predicted - mean, 0.0)
    noise = d.square().sum(0) / others * rows
    level = torch.where(of_self, mean.abs(), 0.0)  # the mean is negative where the step increases the losses
    unit = torch.where(level > 0, level, 1.0)
    spread = finite / others  # makes of the batch's mean that of the others
    d = d / unit * spread
    variance = d.square().sum(0) / rows
    z = d * torch.where(variance > 0, variance.rsqrt(), 0.0)

    def centred(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = torch.where(usable[..., None], x.to(torch.float32) * (factor / unit)[..., None], 0.0)
        x = (x - x.sum(0) / count[:, None]) * spread[:, None]
        return torch.where(usable[..., None], x, 0.0)

    return Step(d, z, variance, noise, total, level, rows - finite, centred(contrasts), centred(halves))
