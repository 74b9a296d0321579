"""Optimizers that divide by the root of squared gradients, without Adam's first moment: one scalar for each block.

Squared gradients are averaged (RMSprop, Adadelta, Adafactor) or summed (Adagrad). Where that starts at 0 and is not
corrected, the first steps are longer than those that follow. So the scalar of the coming step, ``weight``, is made of
what the average is expected to be after it if gradients stay as large as they were: of (1 - alpha^(t + 1)) E g^2 after
t steps. The rest of training counts by the average without that factor, ``curvature``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.distributed.sharding import whole
from ine_callback.optimizers.blocks import State, block_mean, steps_of, total
from ine_callback.optimizers.registry import Group, Rate, UpdateRule, register_optimizer
from ine_callback.optimizers.sgd import SGDRule


@register_optimizer(torch.optim.RMSprop)
class RMSpropRule(SGDRule):
    """b = momentum b + g / (sqrt(v) + eps), w -= lr b, with v = alpha v + (1 - alpha) g^2.

    A gradient acts 1 / (1 - momentum) times. The scalar is 1 / (sqrt(mean of v over the block) + eps). ``centered``
    takes the squared average of g off v. Weight decay is part of the gradient.
    """

    rate_options = (*SGDRule.rate_options, "alpha", "centered")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        weight, rest = (self.scale(optimizer, group, parameters, unscale, settled) for settled in (False, True))
        rest = self.gain(group) * rest
        return Rate(float(group["lr"]), self.step(group), rest, float(group["weight_decay"]) * rest, weight)

    def scale(
        self,
        optimizer: Optimizer,
        group: Group,
        parameters: Sequence[nn.Parameter],
        unscale: Tensor | float,
        settled: bool,
    ) -> Tensor | float:
        """The scalar of a block; 0 where no gradient was seen.

        Args:
            optimizer: The optimizer.
            group: The block's group.
            parameters: The block's.
            unscale: See :meth:`UpdateRule.rate`.
            settled: Whether the start's bias is taken off the average.
        """
        alpha = group["alpha"]

        def warm(_: nn.Parameter, state: State) -> Tensor:
            part = _grown(alpha, state, settled)
            square = part * total(state["square_avg"])
            if group["centered"]:
                square = square - part**2 * total(state["grad_avg"].float().square())
            return square

        def cold(_: nn.Parameter, grad: Tensor) -> Tensor:
            part = 1.0 if settled else (1 - alpha) * (alpha if group["centered"] else 1.0)
            return part * grad.square().sum()

        mean = block_mean(optimizer, parameters, unscale, warm, cold)
        return 0.0 if mean is None else 1 / (mean.clamp_min(0.0).sqrt() + group["eps"])


@register_optimizer(torch.optim.Adagrad)
class AdagradRule(UpdateRule):
    """w -= lr / (1 + t lr_decay) g / (sqrt(s) + eps), with s += g^2, in the step after t others.

    The scalar is 1 / (sqrt(mean of s over the block) + eps) / (1 + t lr_decay), with s as it is expected to be after
    the coming step: what was added so far, times (t + 1) / t. Weight decay is part of the gradient. The present scalar
    stands for the rest of training too, where s grows further.
    """

    rate_options = (*UpdateRule.rate_options, "lr_decay")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        start = float(optimizer.defaults.get("initial_accumulator_value", 0.0))

        def warm(p: nn.Parameter, state: State) -> Tensor:
            t, begin = max(steps_of(state), 1.0), start * p.numel()
            return begin + (total(state["sum"]) - begin) * (t + 1) / t

        def cold(p: nn.Parameter, grad: Tensor) -> Tensor:
            return start * p.numel() + grad.square().sum()

        mean = block_mean(optimizer, parameters, unscale, warm, cold)
        t = max(steps_of(optimizer.state.get(p, {})) for p in parameters)
        scale: Tensor | float = 0.0
        if mean is not None:
            scale = 1 / (mean.sqrt() + group["eps"]) / (1 + t * group["lr_decay"])
        return Rate(float(group["lr"]), self.step(group), scale, float(group["weight_decay"]) * scale, scale)


@register_optimizer(torch.optim.Adadelta)
class AdadeltaRule(RMSpropRule):
    """w -= lr u with u = sqrt(d + eps) / sqrt(v + eps) g; v and d average g^2 and u^2, by rho.

    The scalar is the root of the ratio of the block's means, (mean d + eps) / (mean v + eps); before the first step d
    is 0. Weight decay is part of the gradient; there is no momentum.
    """

    rate_options = (*SGDRule.rate_options, "rho")

    def scale(
        self,
        optimizer: Optimizer,
        group: Group,
        parameters: Sequence[nn.Parameter],
        unscale: Tensor | float,
        settled: bool,
    ) -> Tensor | float:
        rho, eps = group["rho"], group["eps"]

        def moved(_: nn.Parameter, state: State) -> Tensor:
            part = 1 / (1 - rho ** steps_of(state)) if settled else 1.0
            return part * total(state["acc_delta"])

        def square(_: nn.Parameter, state: State) -> Tensor:
            return _grown(rho, state, settled) * total(state["square_avg"])

        above = block_mean(optimizer, parameters, unscale, moved, lambda _, grad: 0.0)
        below = block_mean(
            optimizer, parameters, unscale, square, lambda _, grad: (1.0 if settled else 1 - rho) * grad.square().sum()
        )
        return 0.0 if above is None or below is None else ((above + eps) / (below + eps)).sqrt()


class AdafactorRule(UpdateRule):
    """w -= a u / max(1, rms(u) / d), with u = g / max(sqrt(v), eps1) and a = max(eps2, rms(w)) min(lr, 1 / sqrt(t)).

    v is an average of g^2, of matrices the outer product of its means over rows and columns; its mean over a parameter
    is that of g^2. Each parameter has the scalar a / lr / max(sqrt(mean v), eps1): rms(u) / d is
    taken as at most 1, as it is for gradients that stay as large as they were. A block has the mean of its parameters'
    scalars, weighted by their sizes. Weight decay is decoupled.
    """

    rate_options = (*UpdateRule.rate_options, "beta2_decay")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        lr = float(group["lr"])

        def scale(p: nn.Parameter, mean: Tensor, t: float) -> Tensor:
            eps1, eps2 = group["eps"]
            eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
            size = (total(p.detach().float().square()) / p.numel()).sqrt().clamp_min(eps2)
            limit = min(1.0, 1 / (lr * t**0.5)) if lr else 1.0
            found: Tensor = size * limit / mean.sqrt().clamp_min(eps1) * p.numel()
            return found

        def warm(p: nn.Parameter, state: State) -> Tensor:
            average = state["variance"] if "variance" in state else state["col_var"]
            return scale(p, whole(average.float().mean()), steps_of(state) + 1)

        found = block_mean(optimizer, parameters, unscale, warm, lambda p, grad: scale(p, grad.square().mean(), 1.0))
        weight: Tensor | float = 0.0 if found is None else found
        return Rate(lr, self.step(group), weight, float(group["weight_decay"]), weight)


if hasattr(torch.optim, "Adafactor"):  # torch 2.5
    register_optimizer(torch.optim.Adafactor)(AdafactorRule)


def _grown(beta: float, state: State, settled: bool) -> float:
    """Factor from an average after t steps, (1 - beta^t) E g^2, to that after t + 1, or to E g^2.

    Example:
        >>> round(_grown(0.5, {"step": 1}, settled=False), 3), _grown(0.5, {"step": 1}, settled=True)
        (1.5, 2.0)
    """
    t = steps_of(state)
    return float((1.0 if settled else 1 - beta ** (t + 1)) / (1 - beta**t))
