"""Distributes chains to processes: each runs some around the same weights, and all end with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ine_callback.distributed.processes import Processes
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.settings import BIFSettings


def check_divisible(bif: BIFSettings, processes: int) -> None:
    """Refuses chains (or mirrored pairs of them) that cannot be divided evenly.

    Raises:
        InfluenceError: Naming the next number that can.
    """
    unit = processes * (2 if bif.reduced else 1)
    if bif.chains % unit:
        raise InfluenceError(
            f"BIF: chains={bif.chains} cannot be divided among {processes} processes; take a multiple of {unit}."
        )


def split_chains(bif: BIFSettings, processes: Processes) -> BIFSettings:
    """The settings of one process: its part of the chains; :func:`check_divisible` comes first."""
    check_divisible(bif, processes.count)
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
