"""How an optimizer turns a gradient into a step, now and over the rest of training."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.distributed.sharding import whole

_SGD, _ADAM = (torch.optim.SGD,), (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class Rate:
    """The optimizer's rate for one block.

    Attributes:
        lr: Learning rate of the parameter group.
        step: Effective learning rate of the coming step: the sum of a gradient's future effects through the momentum
            buffer, lr / (1 - momentum) for SGD, lr for Adam.
        curvature: What a unit of summed learning rate contributes to the discount's exponent: 1 / (1 - momentum) for
            SGD, one scalar 1 / rms(sqrt(v) + eps) for Adam's layers (element-wise scaling destroys the ranking, see
            docs/methods/fine.md).
        weight: What a share is multiplied with in a step of size ``step``: Adam's scalar, 1 for SGD.
        decay: What a unit of summed learning rate contributes through weight decay.
    """

    lr: float
    step: float
    curvature: Tensor | float
    decay: Tensor | float
    weight: Tensor | float = 1.0


def known(optimizer: Optimizer) -> bool:
    """Whether the optimizer's rule is known; others act as plain SGD."""
    return isinstance(optimizer, _SGD + _ADAM)


def rate_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter], unscale: Tensor | float = 1.0) -> Rate:
    """The rate of a block's parameters (its first parameter decides the parameter group).

    Args:
        optimizer: Any torch optimizer.
        parameters: The block's parameters.
        unscale: Factor that undoes the scaling of the present gradients under mixed precision.
    """
    group = _group_of(optimizer, parameters[0])
    if group is None:
        return Rate(0.0, 0.0, 0.0, 0.0)
    weight_decay, gain = float(group.get("weight_decay", 0.0)), _gain(optimizer, group)
    lr, step = float(group["lr"]), _step(optimizer, group)
    if isinstance(optimizer, _ADAM):
        scale = _adam_scale(optimizer, group, parameters, unscale)
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay", False))
        return Rate(lr, step, scale, weight_decay if decoupled else weight_decay * scale, scale)
    return Rate(lr, step, gain, weight_decay * gain if isinstance(optimizer, _SGD) else 0.0)


def same_rate(optimizer: Optimizer, a: nn.Parameter, b: nn.Parameter) -> bool:
    """Whether two parameters move at one learning rate; weight decay may differ (biases are often left out of it)."""
    first, second = _group_of(optimizer, a), _group_of(optimizer, b)
    if first is None or second is None:
        return first is second
    return all(first.get(k) == second.get(k) for k in ("lr", "initial_lr", "momentum", "betas"))


def step_rate(optimizer: Optimizer) -> float:
    """Effective learning rate of the first parameter group, :attr:`Rate.step` without the rest."""
    return _step(optimizer, optimizer.param_groups[0])


def _step(optimizer: Optimizer, group: dict[str, Any]) -> float:
    sign = -1.0 if group.get("maximize") else 1.0  # a climbing step raises what a share would have lowered
    return sign * float(group["lr"]) * _gain(optimizer, group)


def _gain(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Sum of a gradient's future effects through SGD's momentum buffer; 1 for everything else."""
    momentum = float(group.get("momentum", 0.0)) if isinstance(optimizer, _SGD) else 0.0
    return (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0  # Nesterov's sum is the same


def _adam_scale(
    optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter], unscale: Tensor | float
) -> Tensor | float:
    """1 / (sqrt(mean of v-hat) + eps) over the block; before the first step v-hat is the present squared gradient."""
    total: Tensor | float = 0.0
    count = 0
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" in state:
            total = total + whole(state["exp_avg_sq"].float().sum()) / (1 - group["betas"][1] ** state["step"])
        elif p.grad is not None:
            total = total + (whole(p.grad.detach()).float() * unscale).square().sum()
        else:
            continue
        count += p.numel()
    if not count:
        return 0.0
    scale: Tensor = 1 / (torch.as_tensor(total / count).sqrt() + group["eps"])
    return scale


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None


class Schedule:
    """The learning rate that remains: read from the schedulers in advance, corrected by what really happens.

    Args:
        planned: Learning rate of every planned optimizer step, relative to the first parameter group (empty: unknown
            horizon, the rest of training is then taken to be as long as the part so far).
        note: Why the plan may differ from the run, shown in the report; empty where it is exact.
    """

    def __init__(self, planned: Sequence[float] = (), note: str = "") -> None:
        self.note = note
        self.steps, self.realised = 0, 0.0
        self._plan(planned)

    def _plan(self, planned: Sequence[float]) -> None:
        self.planned = tuple(planned)
        self._after = [0.0] * (len(self.planned) + 1)
        for t in range(len(self.planned) - 1, -1, -1):
            self._after[t] = self._after[t + 1] + self.planned[t]

    def advance(self, lr: float) -> None:
        """One optimizer step was taken with this learning rate."""
        self.steps += 1
        self.realised += lr

    def remaining(self, lr: float) -> float:
        """Summed learning rate after the coming step, which uses ``lr``.

        A learning rate that left the plan (a plateau scheduler, a callback) rescales what remains.
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
        """Restores what :meth:`state_dict` returned, in a schedule that plans the rest of a resumed run."""
        self.steps, self.realised = state["steps"], state["realised"]
        before = state["planned"].tolist()
        ahead = before[: self.steps] + list(self.planned)
        same = len(ahead) == len(before) and all(math.isclose(a, b) for a, b in zip(ahead, before, strict=True))
        self._plan(before if same else ahead if self.planned else ())

    def summary(self) -> dict[str, Any]:
        """JSON-able record for the report: what was assumed about the rest of training and what came."""
        planned = sum(self.planned)
        notes = [self.note] if self.note else []
        if not self.planned:
            notes.append("unknown horizon: at every step the rest of training was taken to be as long as the past")
        elif self.steps < len(self.planned):
            notes.append(
                f"training stopped after {self.steps} of {len(self.planned)} planned steps: discounts counted on the "
                f"whole plan, {1 - self.realised / planned if planned else 0:.0%} of its learning rate never came, so "
                "all observations are discounted too strongly"
            )
        return {
            "planned_steps": len(self.planned),
            "steps": self.steps,
            "planned_lr_sum": planned,
            "realised_lr_sum": self.realised,
            "note": "; ".join(notes),
        }


def plan(
    optimizer: Optimizer, steps: int, schedulers: Sequence[tuple[Any, int]] = (), keep: Sequence[Any] = ()
) -> Schedule:
    """Simulates learning-rate schedulers on a stand-in optimizer; the real ones are not touched.

    Args:
        optimizer: The real optimizer.
        steps: Number of optimizer steps planned (0: unknown).
        schedulers: Pairs of a torch scheduler and the number of optimizer steps between its steps.
        keep: Objects the schedulers may refer to (the module) and which must not be copied.

    Returns:
        The schedule of the first parameter group.
    """
    lr = float(optimizer.param_groups[0]["lr"])
    if steps <= 0 or math.isinf(steps):
        return Schedule()
    plateau = [s for s, _ in schedulers if isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau)]
    note = "a plateau scheduler cannot be foreseen: the learning rate of each refresh was taken to stay to the end"
    try:
        stand_in, movers = _stand_ins(optimizer, schedulers, keep)
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
            for scheduler, every in movers:
                if t % every == 0:
                    try:
                        scheduler.step()
                    except ValueError:  # OneCycleLR refuses to go past its end; the rate then stays
                        movers = [m for m in movers if m[0] is not scheduler]
    return Schedule(planned, note if plateau else "")


def _stand_ins(
    optimizer: Optimizer, schedulers: Sequence[tuple[Any, int]], keep: Sequence[Any]
) -> tuple[Optimizer, list[tuple[Any, int]]]:
    """Copies of the schedulers that drive a one-parameter SGD with the real parameter groups' settings."""
    dummies = [
        {**{k: v for k, v in g.items() if k != "params"}, "params": [torch.zeros(1)]} for g in optimizer.param_groups
    ]
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    stand_in.param_groups = dummies
    stand_in.step = _stepped  # type: ignore[method-assign]
    memo: dict[int, Any] = {id(optimizer): stand_in, **{id(k): k for k in keep}}
    movers = []
    for scheduler, every in schedulers:
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            movers.append((copy.deepcopy(scheduler, memo), max(1, every)))
    return stand_in, movers


def _stepped(*args: Any, **kwargs: Any) -> None:
    """The stand-in's step: schedulers only check that there is one."""
