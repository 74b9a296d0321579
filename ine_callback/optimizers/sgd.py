"""SGD, with momentum, dampening, Nesterov and weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.optimizers.registry import Group, Rate, UpdateRule, register_optimizer, signed_lr


@register_optimizer(torch.optim.SGD)
class SGDRule(UpdateRule):
    """A gradient acts at once and, through the momentum buffer, in all later steps: ``gain`` times in total."""

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        gain = self.gain(group)
        return Rate(float(group["lr"]), self.step(group), gain, float(group.get("weight_decay", 0.0)) * gain)

    def step(self, group: Group) -> float:
        return signed_lr(group) * self.gain(group)

    def gain(self, group: Group) -> float:
        """Sum of a gradient's future effects through the momentum buffer.

        Example:
            >>> SGDRule().gain({"momentum": 0.5, "dampening": 0.0}), SGDRule().gain({"momentum": 0.0})
            (2.0, 1.0)
        """
        momentum = float(group.get("momentum", 0.0))
        return (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0  # Nesterov's sum is the same
