"""Which dev rows and subsets train the encoder, and which judge it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.airrep.settings import NAME, AirRepSettings
from ine_callback.scores import Floats


@dataclass(frozen=True)
class Split:
    """Indices of dev rows and of subsets.

    Attributes:
        queries: Dev rows to train on.
        held_queries: Dev rows to judge on.
        subsets: Subsets to train on.
        held_subsets: Subsets to judge on.
        dropped: Dev rows whose loss is the same after every training.
    """

    queries: Tensor
    held_queries: Tensor
    subsets: Tensor
    held_subsets: Tensor
    dropped: int


def split(losses: Floats, settings: AirRepSettings) -> Split:
    """Divides dev rows and subsets at random, by the losses [D, M].

    Raises:
        InfluenceError: If fewer than 8 dev rows have losses that differ between subsets.

    Example:
        >>> found = split(np.random.default_rng(0).normal(size=(16, 40)), AirRepSettings(subsets=40))
        >>> len(found.queries), len(found.held_queries), len(found.subsets), len(found.held_subsets)
        (12, 4, 30, 10)
    """
    usable = np.flatnonzero(np.ptp(losses, axis=1) > 0)
    if len(usable) < 8:
        raise InfluenceError(
            f"{NAME}: only {len(usable)} of {len(losses)} dev rows have losses that differ between subsets, and 8 are "
            "needed; train longer, on smaller subsets, or give other dev rows."
        )
    g = torch.Generator().manual_seed(settings.seed)
    parts: list[Tensor] = []
    for known in (torch.from_numpy(usable), torch.arange(losses.shape[1])):
        order, held = known[torch.randperm(len(known), generator=g)], round(settings.held_out * len(known))
        parts += [order[held:], order[:held]]
    queries, held_queries, subsets, held_subsets = parts
    return Split(queries, held_queries, subsets, held_subsets, len(losses) - len(usable))
