"""Several processes share the chains: each runs its part around the same weights, and all end with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif import BIF


class Ranks:
    """The processes of the default group; one alone where there is none.

    Args:
        device: Where tensors for collectives live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0

    def share(self, bif: BIF, owner: str) -> BIF:
        """This process's settings: its part of the chains.

        Raises:
            InfluenceError: If the chains (or mirrored pairs of them) cannot be dealt out evenly.
        """
        unit = 2 if bif.reduced else 1
        if bif.chains % (self.count * unit):
            raise InfluenceError(
                f"{owner}: chains={bif.chains} cannot be dealt out to {self.count} processes; take a multiple of "
                f"{self.count * unit}."
            )
        return replace(bif, chains=bif.chains // self.count)

    def all(self, mine: bool) -> bool:
        """Whether it is so in every process."""
        if self.count == 1:
            return mine
        flag = torch.tensor(int(mine), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def first(self, value: float) -> float:
        """The first process's value: rounding must not let step sizes differ."""
        if self.count == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.broadcast(agreed, 0)
        return float(agreed)

    def gather(self, mine: Any) -> list[Any]:
        """Every process's object, in their order."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found


def join_chains(parts: Sequence[Tensor], mirrored: bool, device: torch.device) -> Tensor:
    """Chains [C, …] of all processes; mirrored ones keep to C and C + C/2.

    Example:
        >>> one, other = torch.tensor([1, -1]), torch.tensor([2, -2])
        >>> join_chains([one, other], True, one.device)
        tensor([ 1,  2, -1, -2])
    """
    parts = [part.to(device) for part in parts]
    if not mirrored:
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1)
