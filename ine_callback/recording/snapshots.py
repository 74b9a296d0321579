"""The model's weights along a run, for a closing pass that takes more than the last ones.

Time is counted in training loss, not in steps. A row acts on the model by its gradient, and gradients vanish with the
losses: a run that fits its rows early does most of its learning in its first steps, one that never does learns all the
time. So snapshots are taken at geometrically growing steps, and those nearest to :data:`SHARES` of the summed loss are
used. Which these are is known at the end only; snapshots before half of the loss so far can never be among them, and
are dropped on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHARES = (0.5, 0.7, 0.9)  # of the training loss that the run summed up
RATIO = 1.2  # of the steps of one snapshot and the one before
ROUNDING = 1e-4  # of the loss so far: losses near 0 are lost in the sum's rounding
SPACING = 0.08  # of the loss so far: snapshots that are nearer to each other are not both kept
MAX_BYTES = 2**29  # of weights and buffers, each time
FEW = 20_000  # rows that are passed again whatever that costs
SHARE = 0.25  # of the rows that the training saw: beyond FEW, at most so many are passed again


@dataclass
class Snapshot:
    """Weights at one time.

    Attributes:
        tensors: Trainable parameters and buffers by name, in the host's memory.
        steps: Steps taken before.
        loss: Summed training loss before, in the host's memory.
        copied: When the copies to the host are over; None: at once.
    """

    tensors: dict[str, Tensor]
    steps: int
    loss: Tensor
    copied: Any = None


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
        [5.0, 12.0, 22.0]
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.missing = wanted, ""
        self._kept: list[Snapshot] = []
        self._next = 1

    def __len__(self) -> int:
        return len(self._kept)

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
        self._kept.append(Snapshot(tensors, steps, _on_host(loss().detach()), _recorded(changing)))

    def _thin(self) -> None:
        """Drops what cannot be used, by the losses that are on the host by now."""
        if len(self._kept) < 2:
            return
        clock = self._clock(self._kept)
        needed = [k for k in range(len(clock) - 1) if clock[k + 1] > min(SHARES) * clock[-1]]
        last, kept = -np.inf, []
        for k in needed:
            if clock[k] >= last + SPACING * clock[-1]:
                kept.append(self._kept[k])
                last = clock[k]
        self._kept = [*kept, self._kept[-1]]

    def _clock(self, kept: Sequence[Snapshot], end: tuple[int, float] | None = None) -> list[float]:
        """The times of snapshots: summed losses where these are known and do not fall, else steps."""
        for one in kept:
            if one.copied is not None:
                one.copied.synchronize()  # over long ago
        losses = [float(one.loss) for one in kept] + ([] if end is None else [end[1]])
        steps = [float(one.steps) for one in kept] + ([] if end is None else [float(end[0])])
        known = bool(np.isfinite(losses).all()) and losses[0] > 0
        falls = known and bool((np.diff(losses) < -ROUNDING * losses[-1]).any())
        return steps if falls or not known else list(np.maximum.accumulate(losses))

    def state_dict(self) -> dict[str, Any]:
        """What was kept; a checkpoint is larger by that."""
        for one in self._kept:
            if one.copied is not None:
                one.copied.synchronize()
        kept = [{"tensors": one.tensors, "steps": one.steps, "loss": float(one.loss)} for one in self._kept]
        return {"kept": kept, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self._next = state["next"]
        if self.wanted:
            self._kept = [
                Snapshot({n: t.cpu() for n, t in one["tensors"].items()}, one["steps"], torch.tensor(one["loss"]))
                for one in state["kept"]
            ]

    def chosen(self, steps: int, loss: float) -> list[Snapshot | None]:
        """The snapshots nearest to :data:`SHARES` of the run, each once; None stands for the present weights.

        Args:
            steps: Optimizer steps of the run.
            loss: Its summed training loss; NaN where it is not known.
        """
        choices: list[Snapshot | None] = [one for one in self._kept if one.steps < steps]
        clock = np.array(self._clock([one for one in choices if one is not None], (steps, loss)))
        choices.append(None)
        nearest = {int(np.abs(clock - share * clock[-1]).argmin()) for share in SHARES}
        return [choices[k] for k in sorted(nearest)]

    def usable(self, module: nn.Module, chosen: Sequence[Snapshot | None], rows: int, observed: int) -> bool:
        """Whether they are whole, and passing ``rows`` rows for each costs little beside training on ``observed``."""
        again, changing = rows * (len(chosen) - 1), set(_changing(module))
        if any(one is not None and set(one.tensors) != changing for one in chosen):
            self.missing = "other parameters were trained when earlier ones were kept"
        elif again > max(FEW, SHARE * observed):
            self.missing = f"earlier ones would take {again} more rows ({observed} were trained on)"
        else:
            return True
        return False

    def load(self, module: nn.Module, chosen: Sequence[Snapshot | None]) -> Iterator[None]:
        """Gives the module each of them in turn, the present ones first; putting these back is up to the caller."""
        for one in sorted(chosen, key=lambda one: one is not None):
            if one is not None:
                if one.copied is not None:
                    one.copied.synchronize()
                with torch.no_grad():
                    for name, tensor in _changing(module).items():
                        tensor.copy_(one.tensors[name])
            yield

    def clear(self) -> None:
        """Frees the memory."""
        self._kept.clear()


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
