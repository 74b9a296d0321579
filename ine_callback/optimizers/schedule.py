"""The learning rate that remains: schedulers are read ahead, and corrected by the steps really taken."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class Schedule:
    """The learning rate that remains: read from the schedulers in advance, corrected by the steps really taken.

    Args:
        planned: Learning rate of every planned optimizer step, that of the first parameter group. Empty if the number
            of steps is unknown: the rest of training is then taken to be as long as the part so far.
        note: Why the schedule may differ from the run, shown in the report; empty where it is exact.
    """

    def __init__(self, planned: Sequence[float] = (), note: str = "") -> None:
        self.note = note
        self.steps, self.realised = 0, 0.0
        self._set(planned)

    def _set(self, planned: Sequence[float]) -> None:
        self.planned = tuple(planned)
        self._after = [0.0] * (len(self.planned) + 1)
        for t in range(len(self.planned) - 1, -1, -1):
            self._after[t] = self._after[t + 1] + self.planned[t]

    def advance(self, lr: float) -> None:
        """Counts one optimizer step, taken with this learning rate."""
        self.steps += 1
        self.realised += lr

    def remaining(self, lr: float) -> float:
        """Summed learning rate after the coming step, which uses ``lr``.

        A learning rate that differs from the planned one (a plateau scheduler, a callback) rescales what remains.
        """
        if not self.planned:
            return self.realised
        t = min(self.steps, len(self.planned) - 1)
        ratio = lr / self.planned[t] if self.planned[t] > 0 else 1.0
        return self._after[t + 1] * ratio if self.steps < len(self.planned) else 0.0

    def state_dict(self) -> dict[str, Any]:
        planned = torch.tensor(self.planned, dtype=torch.float64)
        return {"planned": planned, "steps": self.steps, "realised": self.realised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, in a schedule planned for the rest of a resumed run."""
        self.steps, self.realised = state["steps"], state["realised"]
        before = state["planned"].tolist()
        ahead = before[: self.steps] + list(self.planned)
        same = len(ahead) == len(before) and all(math.isclose(a, b) for a, b in zip(ahead, before, strict=True))
        self._set(before if same else ahead if self.planned else ())

    def summary(self) -> dict[str, Any]:
        """What the report says, JSON-able: the learning rate that was planned and the one that came."""
        planned = sum(self.planned)
        notes = [self.note] if self.note else []
        if not self.planned:
            notes.append("unknown horizon: at every step the rest of training was taken to be as long as the past")
        elif self.steps < len(self.planned):
            notes.append(
                f"training stopped after {self.steps} of {len(self.planned)} planned steps: discounts counted on the "
                f"whole schedule, {1 - self.realised / planned if planned else 0:.0%} of its learning rate never came, "
                "so all observations are discounted too strongly"
            )
        return {
            "planned_steps": len(self.planned),
            "steps": self.steps,
            "planned_lr_sum": planned,
            "realised_lr_sum": self.realised,
            "note": "; ".join(notes),
        }


def planned_schedule(
    optimizer: Optimizer, steps: int, schedulers: Sequence[tuple[Any, int]] = (), keep: Sequence[Any] = ()
) -> Schedule:
    """Simulates learning-rate schedulers on a stand-in optimizer; the real ones are not touched.

    Args:
        optimizer: The real optimizer.
        steps: Number of optimizer steps planned (0: unknown).
        schedulers: Pairs of a torch scheduler and the number of optimizer steps between its steps.
        keep: Objects that the schedulers may refer to and that must not be copied (the module).

    Returns:
        The schedule of the first parameter group.
    """
    lr = float(optimizer.param_groups[0]["lr"])
    if steps <= 0 or math.isinf(steps):
        return Schedule()
    plateau = [s for s, _ in schedulers if isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau)]
    note = "a plateau scheduler cannot be read ahead: at each refresh the learning rate was taken to stay to the end"
    try:
        stand_in, copies = _stand_ins(optimizer, schedulers, keep)
    except Exception as error:
        note = (
            f"the learning-rate scheduler could not be read ahead ({type(error).__name__}: {error}): taken as constant"
        )
        return Schedule([lr] * steps, note)
    planned = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(1, steps + 1):
            planned.append(float(stand_in.param_groups[0]["lr"]))
            for scheduler, every in copies:
                if t % every == 0:
                    try:
                        scheduler.step()
                    except ValueError:  # OneCycleLR refuses to go past its end; the rate then stays
                        copies = [c for c in copies if c[0] is not scheduler]
    return Schedule(planned, note if plateau else "")


def _stand_ins(
    optimizer: Optimizer, schedulers: Sequence[tuple[Any, int]], keep: Sequence[Any]
) -> tuple[Optimizer, list[tuple[Any, int]]]:
    """Copies of the schedulers that drive a one-parameter SGD with the real parameter groups' settings."""
    groups = [
        # a learning rate may be a tensor, which schedulers fill in place
        {k: v.clone() if torch.is_tensor(v) else v for k, v in g.items() if k != "params"}
        | {"params": [torch.zeros(1)]}
        for g in optimizer.param_groups
    ]
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    stand_in.param_groups = groups
    stand_in.step = _no_step  # type: ignore[method-assign]
    memo: dict[int, Any] = {id(optimizer): stand_in, **{id(k): k for k in keep}}
    copies = []
    for scheduler, every in schedulers:
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            copies.append((copy.deepcopy(scheduler, memo), max(1, every)))
    return stand_in, copies


def _no_step(*args: Any, **kwargs: Any) -> None:
    """The stand-in's step does nothing: schedulers only check that there is one."""
