"""Distributes chains to processes: each runs some around the same weights, and all end with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ine_callback.distributed.processes import Processes
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.settings import BIFSettings


def split_chains(bif: BIFSettings, processes: Processes, owner: str) -> BIFSettings:
    """The settings of one process: its part of the chains.

    Raises:
        InfluenceError: If the chains (or mirrored pairs of them) cannot be divided evenly.
    """
    unit = 2 if bif.reduced else 1
    if bif.chains % (processes.count * unit):
        raise InfluenceError(
            f"{owner}: chains={bif.chains} cannot be divided among {processes.count} processes; take a multiple of "
            f"{processes.count * unit}."
        )
    return replace(bif, chains=bif.chains // processes.count)


def join_chains(parts: Sequence[Tensor], mirrored: bool, device: torch.device) -> Tensor:
    """Joins the chains [C, …] of all processes; chain c and its mirror image stay at c and c + C/2.

    Example:
        >>> one, other = torch.tensor([1, -1]), torch.tensor([2, -2])
        >>> join_chains([one, other], True, one.device)
        tensor([ 1,  2, -1, -2])
    """
    parts = [part.to(device) for part in parts]
    if not mirrored:
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1)
