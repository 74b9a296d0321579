"""Several processes train one model (DDP) or share chains: what they tell each other; or one alone.

A recorder must never leave a training waiting. Recorders meet before every exchange of data, and only there learn that
one of them broke down; it tells so without waiting for anybody, and all of them stop recording together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ine_callback.errors import InfluenceError


class Processes:
    """The processes of the default group.

    Args:
        device: Where tensors for collectives live.
        alone: Whether to leave the others out of it.
    """

    _host: Any = None  # group for what lives on the host; None: the default group

    def __init__(self, device: torch.device, alone: bool = False) -> None:
        self._device = device
        together = not alone and dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if self.count > 1 else 0

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
        dist.all_gather_object(found, mine, group=self._host)
        return found

    def join(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows [sum of sizes, ...] of all processes, this one's being [sizes[rank], ...]."""
        if self.count == 1:
            return mine
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, the same to the last bit in all of them."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.count)


class Lockstep(Processes):
    """Processes that record one training together.

    Args:
        device: As for :class:`Processes`.
        alone: As for :class:`Processes`. Otherwise all processes must make theirs at the same time.

    Attributes:
        dissolved: Why they no longer meet; empty while they do.

    Example:
        >>> alone = Lockstep(torch.device("cpu"), alone=True)
        >>> alone.meet(3), alone.common(["a", "b"]) == {"a", "b"}
        ([[3, 0]], True)
    """

    def __init__(self, device: torch.device, alone: bool) -> None:
        super().__init__(device, alone)
        self.dissolved = ""
        if self.count > 1:
            self._host = dist.new_group(backend="gloo")

    def exchange(self, one: int = 0, other: int = 0) -> list[list[int]]:
        """Every process's two numbers, in their order. What may fail comes before, the exchange of data right after.

        Raises:
            InfluenceError: If one of them has left; at once, where that is known.
        """
        if self.count == 1:
            return [[one, other]]
        if not self.dissolved:
            work, told, _ = self._tell([1, one, other])
            work.wait()
            found = [part.tolist() for part in told]
            left = [rank for rank, (there, *_) in enumerate(found) if not there]
            if not left:
                return [numbers for _, *numbers in found]
            self.dissolved = f"process {left[0]} of {self.count} stopped recording; its own warning says why."
        raise InfluenceError(self.dissolved)

    def leave(self) -> None:
        """Tells the others at their next meeting that this process records no more; waits for nobody."""
        if self.count > 1 and not self.dissolved:
            self.dissolved = "this process stopped recording."
            self._parting = self._tell([0, 0, 0])

    def close(self) -> None:
        """Gives the group back; where one of them left, words may still be on their way, and it stays."""
        if self.count > 1 and not self.dissolved:
            self.dissolved = "the recording is over."
            dist.destroy_process_group(self._host)

    def _tell(self, numbers: list[int]) -> tuple[Any, list[Tensor], Tensor]:
        """Begins an exchange; all that it returns must live until it is over."""
        told, mine = [torch.zeros(3, dtype=torch.int64) for _ in range(self.count)], torch.tensor(numbers)
        return dist.all_gather(told, mine, group=self._host, async_op=True), told, mine

    def common(self, names: Iterable[str]) -> set[str]:
        """The names that all of them have. A meeting."""
        mine = sorted(names)
        digest = int.from_bytes(hashlib.sha256("\0".join(mine).encode()).digest()[:7], "big")
        if len({one for one, _ in self.exchange(digest)}) == 1:
            return set(mine)
        return set.intersection(*map(set, self.gather(mine)))
