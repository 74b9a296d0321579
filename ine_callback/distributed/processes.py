"""Exchanges between the processes that train one model or run chains together; or a single process.

A recorder must never leave a training waiting. So recorders exchange two numbers before they exchange data. A process
whose recording failed says so in such an exchange, without waiting for the others. All of them then stop recording.
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
        alone: Whether to act as a single process.
    """

    _host: Any = None  # group for data on the host; None: the default group

    def __init__(self, device: torch.device, alone: bool = False) -> None:
        self._device = device
        together = not alone and dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if self.count > 1 else 0

    def all(self, mine: bool) -> bool:
        """Whether ``mine`` is true in every process."""
        if self.count == 1:
            return mine
        flag = torch.tensor(int(mine), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def first(self, value: float) -> float:
        """The first process's value, so that rounding cannot make values differ between processes."""
        if self.count == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.broadcast(agreed, 0)
        return float(agreed)

    def gather(self, mine: Any) -> list[Any]:
        """Every process's object, in the order of ranks."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, group=self._host)
        return found

    def join(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows [sum of sizes, ...] of all processes; ``mine`` is [sizes[rank], ...]."""
        if self.count == 1:
            return mine
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, equal in every bit in all of them."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.count)


class Lockstep(Processes):
    """Processes that record one training together.

    Args:
        device: As for :class:`Processes`.
        alone: As for :class:`Processes`. Otherwise all processes must construct theirs at the same time.

    Attributes:
        dissolved: Why there are no more exchanges; empty while there are.

    Example:
        >>> alone = Lockstep(torch.device("cpu"), alone=True)
        >>> alone.exchange(3), alone.common(["a", "b"]) == {"a", "b"}
        ([[3, 0]], True)
    """

    def __init__(self, device: torch.device, alone: bool) -> None:
        super().__init__(device, alone)
        self.dissolved = ""
        if self.count > 1:
            self._host = dist.new_group(backend="gloo")

    def exchange(self, one: int = 0, other: int = 0) -> list[list[int]]:
        """Every process's two numbers, in the order of ranks.

        Whatever may fail comes before this, and the exchange of data comes right after it.

        Raises:
            InfluenceError: If a process has left; without an exchange, where that is known.
        """
        if self.count == 1:
            return [[one, other]]
        if not self.dissolved:
            work, received, _ = self._send([1, one, other])
            work.wait()
            found = [part.tolist() for part in received]
            left = [rank for rank, (there, *_) in enumerate(found) if not there]
            if not left:
                return [numbers for _, *numbers in found]
            self.dissolved = f"process {left[0]} of {self.count} stopped recording; its own warning says why."
        raise InfluenceError(self.dissolved)

    def leave(self) -> None:
        """Tells the others at their next exchange that this process stopped recording; does not wait for them."""
        if self.count > 1 and not self.dissolved:
            self.dissolved = "this process stopped recording."
            self._parting = self._send([0, 0, 0])

    def close(self) -> None:
        """Destroys the group; not where a process left, whose last message may still be on its way."""
        if self.count > 1 and not self.dissolved:
            self.dissolved = "the recording is over."
            dist.destroy_process_group(self._host)

    def _send(self, numbers: list[int]) -> tuple[Any, list[Tensor], Tensor]:
        """Begins an exchange; what it returns must be held until the exchange is over."""
        received, mine = [torch.zeros(3, dtype=torch.int64) for _ in range(self.count)], torch.tensor(numbers)
        return dist.all_gather(received, mine, group=self._host, async_op=True), received, mine

    def common(self, names: Iterable[str]) -> set[str]:
        """The names that all processes have. Includes an exchange."""
        mine = sorted(names)
        digest = int.from_bytes(hashlib.sha256("\0".join(mine).encode()).digest()[:7], "big")
        if len({one for one, _ in self.exchange(digest)}) == 1:
            return set(mine)
        return set.intersection(*map(set, self.gather(mine)))
