"""The model's weights along a run, for a closing pass that takes more than the last ones.

Time is counted in training loss, not in steps. A row acts on the model by its gradient, and gradients vanish with the
losses: a run that fits its rows early does most of its learning in its first steps, one that never does learns all the
time. A step counts ``log(1 + loss / mean loss of the run)``, so that a few steps of huge losses are not the whole run.
Snapshots are taken at geometrically growing steps, and those nearest to :data:`SHARES` of that time are used. Which
these are is known at the end only; those before the first share of the time so far are dropped on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SHARES = (0.5, 0.7, 0.9)  # of the run's time
RATIO = 1.2  # of the steps of one snapshot and the one before
ROUNDING = 1e-4  # of the loss so far: losses near 0 are lost in the sum's rounding
SPACING = 0.08  # of the time so far: snapshots that are nearer to each other are not both kept
MAX_BYTES = 2**29  # of weights and buffers, each time
FEW = 20_000  # rows that are passed again whatever that costs
SHARE = 0.25  # of the rows that the training saw: beyond FEW, at most so many are passed again


@dataclass
class Snapshot:
    """Weights at one time.

    Attributes:
        tensors: Trainable parameters and buffers by name, in the host's memory; None once they are dropped.
        steps: Steps taken before.
        loss: Summed training loss before, in the host's memory.
        copied: When the copies to the host are over; None: at once.
    """

    tensors: dict[str, Tensor] | None
    steps: int
    loss: Tensor
    copied: Any = None

    def wait(self) -> None:
        """Until the copies are over."""
        if self.copied is not None:
            self.copied.synchronize()


class Snapshots:
    """Keeps trainable parameters and buffers in the host's memory, some of each.

    One run's last weights are one draw. What a row does to a query at earlier ones differs, by more than it does
    between runs at the end, so the mean over several is nearer to the mean over runs.

    Args:
        wanted: Whether to keep any.

    Attributes:
        missing: Why there are none; empty where there are.

    Example:
        >>> model, snapshots = torch.nn.Linear(1, 1, bias=False), Snapshots(wanted=True)
        >>> for step in range(1, 101):
        ...     _ = model.weight.data.fill_(step)
        ...     snapshots.keep(model, step, lambda: torch.tensor(1 - 0.9**step))  # almost all is learned in 20 steps
        >>> chosen = snapshots.chosen(100, 1.0)
        >>> [model.weight.item() for _ in snapshots.load(model, chosen)]
        [10.0, 16.0, 31.0]
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.missing = wanted, ""
        self._all: list[Snapshot] = []
        self._next = 1

    def __len__(self) -> int:
        return len(self._kept())

    def _kept(self) -> list[int]:
        """Which snapshots have their tensors."""
        return [k for k, one in enumerate(self._all) if one.tensors is not None]

    def keep(self, module: nn.Module, steps: int, loss: Callable[[], Tensor]) -> None:
        """Called after each step: copies the weights if it is time.

        Args:
            module: The model.
            steps: Optimizer steps so far.
            loss: Tells the summed training loss so far, a scalar; NaN where it is not known.
        """
        if not self.wanted or steps < self._next:
            return
        self._next = max(steps + 1, int(steps * RATIO))
        changing = _changing(module)
        size = sum(tensor.nbytes for tensor in changing.values())
        if size > MAX_BYTES:
            self.missing = f"earlier ones take {size / 2**20:.0f} MB each (at most {MAX_BYTES / 2**20:.0f})"
            return
        self._thin()
        tensors = {name: _on_host(tensor) for name, tensor in changing.items()}
        self._all.append(Snapshot(tensors, steps, _on_host(loss().detach()), _recorded(changing)))

    def _thin(self) -> None:
        """Drops what will not be used; if a copy is still under way, the next time."""
        kept = self._kept()
        if len(kept) < 2 or not all(one.copied is None or one.copied.query() for one in self._all):
            return
        clock, last = self._clock(), -np.inf
        for k, after in pairwise(kept):
            needed = clock[after] > min(SHARES) * clock[-1] and clock[k] >= last + SPACING * clock[-1]
            if needed:
                last = clock[k]
            else:
                self._all[k].tensors = None

    def _clock(self, end: tuple[int, float] | None = None) -> NDArray[np.float64]:
        """The times of all snapshots, and of the end: by losses where these are known and not below 0, else steps."""
        for one in self._all:
            one.wait()
        times = [(one.steps, float(one.loss)) for one in self._all] + ([] if end is None else [end])
        steps: NDArray[np.float64] = np.array([time[0] for time in times], dtype=np.float64)
        losses = np.array([time[1] for time in times])
        gained = np.diff(losses, prepend=0.0)
        if not np.isfinite(losses).all() or losses[-1] <= 0 or (gained < -ROUNDING * losses[-1]).any():
            return steps
        taken = np.maximum(np.diff(steps, prepend=0.0), 1e-12)
        counted = np.log1p(gained.clip(0) / taken * (steps[-1] / losses[-1]))
        clock: NDArray[np.float64] = np.cumsum(taken * counted)
        return clock

    def state_dict(self) -> dict[str, Any]:
        """What was kept; a checkpoint is larger by that."""
        for one in self._all:
            one.wait()
        taken = [{"tensors": one.tensors, "steps": one.steps, "loss": float(one.loss)} for one in self._all]
        return {"taken": taken, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self._next = state["next"]
        for one in state["taken"] if self.wanted else ():
            tensors = one["tensors"]
            moved = None if tensors is None else {name: tensor.cpu() for name, tensor in tensors.items()}
            self._all.append(Snapshot(moved, one["steps"], torch.tensor(one["loss"])))

    def chosen(self, steps: int, loss: float) -> list[Snapshot | None]:
        """The snapshots nearest to :data:`SHARES` of the run, each once; None stands for the present weights.

        Args:
            steps: Optimizer steps of the run.
            loss: Its summed training loss; NaN where it is not known.
        """
        clock, count = self._clock((steps, loss)), len(self._all)
        at = np.array([*(k for k in self._kept() if self._all[k].steps < steps), count])
        nearest = {int(at[np.abs(clock[at] - share * clock[-1]).argmin()]) for share in SHARES}
        return [None if k == count else self._all[k] for k in sorted(nearest)]

    def usable(self, module: nn.Module, chosen: Sequence[Snapshot | None], rows: int, observed: int) -> bool:
        """Whether they are whole, and passing ``rows`` rows for each costs little beside training on ``observed``."""
        passes = len(chosen) - 1 if self._all else len(SHARES) - 1  # none were kept where they would cost too much
        again, changing = rows * passes, set(_changing(module))
        if any(one is not None and set(one.tensors or ()) != changing for one in chosen):
            self.missing = "other parameters were trained when earlier ones were kept"
        elif not affordable(again, observed):
            self.missing = f"earlier ones would take {again} more rows ({observed} were trained on)"
        else:
            return True
        return False

    def load(self, module: nn.Module, chosen: Sequence[Snapshot | None]) -> Iterator[None]:
        """Gives the module each of them in turn, the present ones first; putting these back is up to the caller."""
        for one in sorted(chosen, key=lambda one: one is not None):
            if one is not None and one.tensors is not None:
                one.wait()
                with torch.no_grad():
                    for name, tensor in _changing(module).items():
                        tensor.copy_(one.tensors[name])
            yield

    def clear(self) -> None:
        """Frees the memory."""
        self._all.clear()


def affordable(again: int, observed: int) -> bool:
    """Whether passing ``again`` more rows costs little beside training on ``observed``."""
    return again <= max(FEW, SHARE * observed)


def _changing(module: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name."""
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return trained | dict(module.named_buffers())


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, without waiting for a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _recorded(changing: dict[str, Tensor]) -> Any:
    """An event behind the copies, where they are made by a GPU."""
    if not any(tensor.is_cuda for tensor in changing.values()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event
