"""SGD, with momentum, dampening, Nesterov and weight decay, and ASGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.optimizers.blocks import State, block_mean
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
        momentum, dampening = (float(group.get(name, 0.0)) for name in ("momentum", "dampening"))
        return (1 - dampening) / (1 - momentum) if momentum else 1.0  # Nesterov's sum is the same


@register_optimizer(torch.optim.ASGD)
class ASGDRule(UpdateRule):
    """w = (1 - lambd eta) w - eta g, with eta = lr / (1 + lambd lr t)^alpha set by the step before.

    The scalar is eta / lr, of both terms. Weight decay is part of the gradient, so decay is (weight_decay + lambd)
    eta / lr. The average of the weights, which ASGD keeps in its state, is not what the model computes with.
    """

    rate_options = (*UpdateRule.rate_options, "lambd", "alpha")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        lr = float(group["lr"])

        def warm(p: nn.Parameter, state: State) -> Tensor | float:
            return state["eta"] / lr * p.numel() if lr else 1.0 * p.numel()

        found = block_mean(optimizer, parameters, unscale, warm, lambda p, grad: 1.0 * p.numel())
        scale = 1.0 if found is None else found
        decay = (float(group["weight_decay"]) + float(group["lambd"])) * scale
        return Rate(lr, self.step(group), scale, decay, scale)
