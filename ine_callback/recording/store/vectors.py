"""The rows' vectors during a run: sums of their compressed, discounted contributions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.recording.observations import Observations
from ine_callback.recording.store.settings import GradientStore
from ine_callback.scoring.compression import Compression

CHUNK = 1 << 11  # rows that are moved into another basis at once


class RowVectors:
    """Vectors [N, W] of the rows that belong to this process: those whose index leaves its rank.

    Args:
        settings: Of the store.
        compression: What compresses contributions.
        device: Of the model.
        rows: Number of rows; None: grows.
        rank: Of this process.
        processes: How many there are.
    """

    def __init__(
        self,
        settings: GradientStore,
        compression: Compression,
        device: torch.device,
        rows: int | None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.settings, self._compression, self._device = settings, compression, device
        self._rank, self._processes = rank, processes
        compression.moved, compression.ending = self._move, self._discount
        self._width, self._grows = 0, rows is None
        self._sums = torch.zeros(0, 0, device=device)
        self._delayed: Tensor | None = torch.zeros(0, 0, device=device)  # sums since the last refresh, not discounted
        self._open = torch.zeros(0, dtype=torch.bool, device=device)  # which rows have such sums
        self._touched = torch.zeros(0, dtype=torch.bool, device=device)  # other rows' sums are 0 in any basis
        self._waiting: deque[tuple[Tensor, Tensor, Any]] = deque()  # on their way to the host
        self._grow(rows or 0)

    def _own(self, rows: int) -> int:
        """How many of the first rows belong to this process."""
        return max(0, -(-(rows - self._rank) // self._processes))

    def _grow(self, rows: int) -> None:
        """Makes room for the first ``rows`` rows, and one more that collects those of other processes."""
        size, width = self._own(rows) + 1, max(self._width, self._compression.size)
        if size <= len(self._sums) and width <= self._sums.shape[1]:
            return
        self._drain(wait=True)
        # where the number of rows is unknown a copy is made every so often, not at each step
        size = max(size, len(self._sums), 3 * len(self._sums) // 2 if self._grows else 0)
        # in the host's memory once it is there, and where it would take too much of the device's
        there = self._device if 4 * size * width <= self.settings.device_bytes else torch.device("cpu")
        there = self._sums.device if self._sums.numel() and not self._sums.is_cuda else there
        if there.type != self._device.type or 2 * 4 * size * width > self.settings.device_bytes:
            self._discount()
            self._delayed = None  # there is no room for two sums of each row
        elif self._delayed is not None:
            self._delayed = _enlarged(self._delayed, size, width, there)
        self._sums = _enlarged(self._sums, size, width, there)
        self._touched, self._open = (
            _enlarged(marks[:, None], size, 1, there)[:, 0] for marks in (self._touched, self._open)
        )
        self._width = width

    def update(self, observations: Observations, rate: float, known: int) -> None:
        """Adds a step's observations, at its rate; ``known`` rows exist."""
        self._grow(known)
        contributions, count = observations.compressed.float(), len(observations.rows)
        if count < 2 or rate == 0.0 or not contributions.shape[1]:
            return
        usable = contributions.abs().amax(1, keepdim=True).isfinite()
        contributions = torch.where(usable, contributions, 0.0)
        others = (usable.sum() - 1).clamp(min=1)  # shifts are rate (x - mean of the others), 0 of rows that overflowed
        shifts = contributions * ((1 + 1 / others) * rate)
        shifts -= usable * (rate / others) * contributions.sum(0)
        mine = observations.rows % self._processes == self._rank
        places = torch.where(mine, observations.rows // self._processes, len(self._sums) - 1)
        if self._delayed is not None:
            self._delayed[:, : shifts.shape[1]].index_add_(0, places, shifts)
            self._open.index_fill_(0, places, True)
        elif self._sums.device == shifts.device:
            self._add(places, self._compression.discounted(shifts))
        else:
            self._send(places, self._compression.discounted(shifts))

    def _discount(self) -> None:
        """Discounts what waits for it: the sum of a row's steps since the last refresh, which have one discount."""
        if self._delayed is None:
            return
        width, waiting = self._compression.discounted_size, self._open.nonzero()[:, 0]
        for start in range(0, len(waiting), CHUNK):
            rows = waiting[start : start + CHUNK]
            self._add(rows, self._compression.discounted(self._delayed[rows, :width]))
            self._delayed.index_fill_(0, rows, 0.0)
        self._open.zero_()

    def _add(self, places: Tensor, shifts: Tensor) -> None:
        self._sums[:, : shifts.shape[1]].index_add_(0, places, shifts)
        self._touched.index_fill_(0, places, True)

    def _send(self, places: Tensor, shifts: Tensor) -> None:
        """Copies to the host without waiting; what has arrived is added when the next step comes."""
        copies = [
            torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True) for x in (places, shifts)
        ]
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((copies[0], copies[1], event))
        self._drain(wait=len(self._waiting) > 8)

    def _drain(self, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0][2].query()):
            places, shifts, event = self._waiting.popleft()
            event.synchronize()
            self._add(places, shifts)

    def _move(self, move: Callable[[Tensor], Tensor], width: int) -> None:
        """Moves all vectors into another basis of ``width`` entries."""
        self._drain(wait=True)
        self._discount()
        before = self._width
        if not before:  # no step was taken yet
            return
        self._width = max(before, width)
        self._grow((len(self._sums) - 1) * self._processes)
        for rows in self._touched.nonzero()[:, 0].split(CHUNK):
            moved = move(self._sums[rows, :before]).to(self._sums)
            self._sums[rows] = nn.functional.pad(moved, (0, self._sums.shape[1] - moved.shape[1]))

    def own(self, rows: int) -> Tensor:
        """Which of the first ``rows`` rows belong to this process [n]."""
        return torch.arange(self._own(rows)) * self._processes + self._rank

    def vectors(self, rows: int) -> Tensor:
        """Vectors [n, W] of these rows."""
        self._grow(rows)
        self._drain(wait=True)
        self._discount()
        return self._sums[: self._own(rows), : self._compression.size]

    def state_dict(self) -> dict[str, Any]:
        """This process's vectors and the basis: tensors and plain types."""
        self._drain(wait=True)
        self._discount()  # those that go on from here make another
        sums = self._sums[:, : self._compression.size]
        return {
            "rank": self._rank,
            "processes": self._processes,
            "sums": sums.cpu().clone(),
            "touched": self._touched.cpu().clone(),
            "compression": self._compression.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._compression.load_state_dict(state["compression"])
        saved = state["sums"]
        self._width = saved.shape[1]
        self._grow((len(saved) - 1) * self._processes)
        self._sums.zero_()
        self._sums[: len(saved) - 1, : saved.shape[1]] = saved[:-1].to(self._sums)
        self._touched[: len(saved) - 1] = state["touched"][:-1].to(self._touched)


def _enlarged(x: Tensor, rows: int, width: int, device: torch.device) -> Tensor:
    """With zeros behind its rows and columns [rows, width]; the last row, of other processes, is left behind."""
    out = torch.zeros(rows, width, dtype=x.dtype, device=device)
    if x.numel():
        out[: len(x) - 1, : x.shape[1]] = x[:-1].to(device)
    return out
