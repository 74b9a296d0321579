"""Adam and AdamW: one scalar for each block stands for the element-wise scaling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.distributed.sharding import whole
from ine_callback.optimizers.registry import Group, Rate, UpdateRule, register_optimizer


@register_optimizer(torch.optim.Adam)
class AdamRule(UpdateRule):
    """The first moment's average leaves a gradient's total effect as it is, so the effective learning rate is lr."""

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        scale = _scale(optimizer, group, parameters, unscale)
        weight_decay = float(group.get("weight_decay", 0.0))
        decay = weight_decay if self.decoupled(group) else weight_decay * scale
        return Rate(float(group["lr"]), self.step(group), scale, decay, scale)

    def decoupled(self, group: Group) -> bool:
        """Whether weight decay acts on the weights, not through the gradient."""
        return bool(group.get("decoupled_weight_decay", False))


@register_optimizer(torch.optim.AdamW)
class AdamWRule(AdamRule):
    """Adam with decoupled weight decay."""

    def decoupled(self, group: Group) -> bool:
        return True


def _scale(
    optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
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
