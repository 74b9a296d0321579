"""Optimizers with two moments (Adam and its relatives): one scalar for each block stands for the element-wise scaling.

The first moment is an average, which spreads a gradient over later steps and leaves its total effect as it is. So the
effective learning rate is lr, and all that differs is the scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.optimizers.blocks import State, block_mean, steps_of, total
from ine_callback.optimizers.registry import Group, Rate, UpdateRule, register_optimizer


@register_optimizer(torch.optim.Adam)
class AdamRule(UpdateRule):
    """w -= lr m-hat / (sqrt(v-hat) + eps), taken as lr m-hat / (sqrt(mean of v-hat over the block) + eps).

    Before the first step v-hat is the present squared gradient. Weight decay is part of the gradient, so it is scaled
    as that is; decoupled, it is lr times weight decay.
    """

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        scale = self.scale(optimizer, group, parameters, unscale)
        weight_decay = float(group.get("weight_decay", 0.0))
        decay = weight_decay if self.decoupled(group) else weight_decay * scale
        return Rate(float(group["lr"]), self.step(group), scale, decay, scale)

    def decoupled(self, group: Group) -> bool:
        """Whether weight decay acts on the weights, not through the gradient."""
        return bool(group.get("decoupled_weight_decay", False))

    def scale(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Tensor | float:
        """The scalar of a block; 0 where no gradient was seen."""
        mean = self.mean_square(optimizer, group, parameters, unscale)
        return 0.0 if mean is None else 1 / (mean.sqrt() + group["eps"])

    def mean_square(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Tensor | None:
        """Mean of v-hat over the block."""
        beta, name = group["betas"][1], "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        return block_mean(
            optimizer,
            parameters,
            unscale,
            lambda _, state: total(state[name]) / (1 - beta ** state["step"]),
            lambda _, grad: grad.square().sum(),
        )


@register_optimizer(torch.optim.AdamW)
class AdamWRule(AdamRule):
    """Adam with decoupled weight decay."""

    def decoupled(self, group: Group) -> bool:
        return True


@register_optimizer(torch.optim.SparseAdam)
class SparseAdamRule(AdamRule):
    """Adam whose moments move only where a sparse gradient has elements: v-hat is the mean over those that ever had.

    Elements that no gradient has come to are 0 and would make the mean, which Adam takes of all, too small.
    """

    def mean_square(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Tensor | None:
        def warm(p: nn.Parameter, state: State) -> Tensor:
            v = state["exp_avg_sq"]
            there = (v > 0).sum().clamp_min(1)
            mean: Tensor = total(v) / there / (1 - group["betas"][1] ** state["step"])
            return mean * p.numel()

        return block_mean(optimizer, parameters, unscale, warm, lambda p, grad: grad.square().mean() * p.numel())


@register_optimizer(torch.optim.NAdam)
class NAdamRule(AdamRule):
    """w -= lr ((1 - mu_t) g / (1 - M_t) + mu_{t+1} m / (1 - M_{t+1})) / (sqrt(v-hat) + eps), M_t = mu_1 ... mu_t.

    A gradient acts by 1 - mu at once and, through m, by mu in total later: by 1, as in Adam, once mu moves slowly (it
    goes from beta1 / 2 to beta1). So the rule is Adam's.
    """


@register_optimizer(torch.optim.RAdam)
class RAdamRule(AdamRule):
    """w -= lr r_t m-hat / (sqrt(v-hat) + eps / sqrt(1 - beta2^t)); lr m-hat in the first steps, until rho_t > 5.

    With rho = 2 / (1 - beta2) - 1, rho_t = rho - 2 t beta2^t / (1 - beta2^t) and
    r_t^2 = (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t). The coming step's r_t, which is a warm-up to 1,
    stands for the rest of training as well.
    """

    def scale(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Tensor | float:
        mean = self.mean_square(optimizer, group, parameters, unscale)
        if mean is None:
            return 0.0
        beta = float(group["betas"][1])
        t = 1 + max(steps_of(optimizer.state.get(p, {})) for p in parameters)
        unbiased = 1 - beta**t
        full = 2 / (1 - beta) - 1
        length = full - 2 * t * beta**t / unbiased
        if length <= 5:
            return 1.0
        rectified: float = ((length - 4) * (length - 2) * full / ((full - 4) * (full - 2) * length)) ** 0.5
        scale: Tensor = rectified / (mean.sqrt() + group["eps"] / unbiased**0.5)
        return scale


@register_optimizer(torch.optim.Adamax)
class AdamaxRule(AdamRule):
    """w -= lr m-hat / u with u = max(beta2 u, |g| + eps), taken as lr m-hat / sqrt(mean of u^2 over the block)."""

    def scale(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Tensor | float:
        def warm(_: nn.Parameter, state: State) -> Tensor:
            return total(state["exp_inf"].float().square())

        mean = block_mean(
            optimizer, parameters, unscale, warm, lambda _, grad: (grad.abs() + group["eps"]).square().sum()
        )
        return 0.0 if mean is None else 1 / mean.sqrt()
