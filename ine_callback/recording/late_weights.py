"""The model's weights at two late times of a run, for a closing pass that takes more than the last ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ine_callback.optimizers.schedule import Schedule

AT = (9 / 16, 13 / 16)  # of the planned steps
MAX_BYTES = 2**29  # of weights and buffers, each time
FEW = 20_000  # rows that are passed again whatever that costs
SHARE = 0.25  # of the rows that the training saw: beyond FEW, at most so many are passed again


class LateWeights:
    """Keeps trainable parameters and buffers in the host's memory at :data:`AT` of the planned steps.

    One run's last weights are one draw. What a row does to a query at earlier ones differs, by more than it does
    between runs at the end, so the mean over both is nearer to the mean over runs.

    Args:
        wanted: Whether to keep any.

    Attributes:
        missing: Why there are none; empty where there are, or where no number of steps was planned.

    Example:
        >>> from ine_callback.optimizers.schedule import Schedule
        >>> model, late = torch.nn.Linear(1, 1, bias=False), LateWeights(wanted=True)
        >>> schedule = Schedule([0.1] * 16)
        >>> for step in range(16):
        ...     _ = model.weight.data.fill_(step + 1.0)
        ...     schedule.advance(0.1)
        ...     late.keep(model, schedule)
        >>> [model.weight.item() for _ in late.load(model)]
        [9.0, 13.0]
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.missing = wanted, ""
        self._kept: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, module: nn.Module, schedule: Schedule) -> None:
        """Called after each step: copies the weights if it is time."""
        planned = len(schedule.planned)
        if not self.wanted or not planned or schedule.steps not in {max(1, int(share * planned)) for share in AT}:
            return
        changing = _changing(module)
        size = sum(tensor.nbytes for tensor in changing.values())
        if size > MAX_BYTES:
            self.missing = f"earlier ones take {size / 2**20:.0f} MB each (at most {MAX_BYTES / 2**20:.0f})"
            return
        self._kept.append({name: _on_host(tensor) for name, tensor in changing.items()})

    def state_dict(self) -> list[dict[str, Tensor]]:
        """What was kept; a checkpoint is larger by that."""
        return list(self._kept)

    def load_state_dict(self, state: list[dict[str, Tensor]]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        if self.wanted:
            self._kept = [{name: tensor.cpu() for name, tensor in kept.items()} for kept in state]

    def usable(self, module: nn.Module, rows: int, observed: int) -> bool:
        """Whether they are whole, and passing ``rows`` rows for each costs little beside training on ``observed``."""
        again, changing = rows * len(self), set(_changing(module))
        if any(set(kept) != changing for kept in self._kept):
            self.missing = "other parameters were trained when earlier ones were kept"
        elif again > max(FEW, SHARE * observed):
            self.missing = f"earlier ones would take {again} more rows ({observed} were trained on)"
        else:
            return True
        self._kept.clear()
        return False

    def load(self, module: nn.Module) -> Iterator[None]:
        """Gives the module each of them in turn; putting its own back is up to the caller."""
        if self._kept and next(iter(_changing(module).values())).is_cuda:
            torch.cuda.synchronize()  # the copies to the host may still be under way
        while self._kept:
            kept = self._kept.pop(0)
            with torch.no_grad():
                for name, tensor in _changing(module).items():
                    tensor.copy_(kept[name])
            yield


def _changing(module: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name."""
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return trained | dict(module.named_buffers())


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, without waiting for a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
