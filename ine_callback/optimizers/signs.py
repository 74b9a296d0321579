"""Optimizers that take the sign of a gradient (Lion, Rprop), linearised: one scalar for each block.

sign(c) is no linear function of a gradient. It is taken as c / mean |c| over the block: the update that is as large in
the mean, along c. That is an approximation, exact where all |c| of the block are the same. Rows whose gradient turns no
sign moved nothing; the linearisation says how much they would have on average over steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.optimizers.blocks import State, block_mean, total
from ine_callback.optimizers.registry import Group, Rate, UpdateRule, register_optimizer


@register_optimizer("lion_pytorch.Lion", "timm.optim.Lion")
class LionRule(UpdateRule):
    """w -= lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g; weight decay is decoupled.

    A gradient acts by 1 - beta1 at once and, through m, by beta1 in total later. So the effective learning rate is lr,
    and the scalar 1 / mean |m| over the block; before the first step m is the present gradient. m starts at 0, and the
    optimizer counts no steps, so the scalar is too large in the first 1 / (1 - beta2) steps.
    """

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        mean = block_mean(
            optimizer,
            parameters,
            unscale,
            lambda _, state: total(state["exp_avg"].abs()),
            lambda _, grad: grad.abs().sum(),
        )
        scale = _inverse(mean)
        decay = float(group.get("weight_decay", 0.0))
        if getattr(optimizer, "decoupled_wd", False):  # lion_pytorch: relative to the initial learning rate
            decay /= float(optimizer._init_lr)  # type: ignore[attr-defined]
        return Rate(float(group["lr"]), self.step(group), scale, decay, scale)


@register_optimizer(torch.optim.Rprop)
class RpropRule(UpdateRule):
    """w -= s sign(g), where each element's s grows while its gradient keeps its sign; none where it has just turned.

    The scalar is mean s / mean |g| over the elements that moved in the last step, relative to the lr that a schedule
    has no further part in: lr is only the first s. Rprop has no weight decay, and is not made for batches.
    """

    rate_options = (*UpdateRule.rate_options, "etas", "step_sizes")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        lr = float(group["lr"])

        def moved(_: nn.Parameter, state: State) -> Tensor:
            return total(state["step_size"] * state["prev"].sign().abs())

        def size(_: nn.Parameter, state: State) -> Tensor:
            return total(state["prev"].abs())

        above = block_mean(optimizer, parameters, unscale, moved, lambda p, grad: lr * grad.sign().abs().sum())
        below = block_mean(optimizer, parameters, unscale, size, lambda _, grad: grad.abs().sum())
        scale: Tensor | float = 0.0
        if above is not None and lr:
            scale = above / lr * _inverse(below)
        return Rate(lr, self.step(group), scale, 0.0, scale)


def _inverse(mean: Tensor | None) -> Tensor | float:
    """1 / mean; 0 where it is 0, or nothing was seen."""
    if mean is None:
        return 0.0
    found: Tensor = torch.where(mean > 0, 1 / mean, 0.0)
    return found
