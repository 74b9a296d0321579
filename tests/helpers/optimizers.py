"""Optimizers with an update rule, how to freeze their element-wise scaling, and a Lion as lion_pytorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LONG_AGO = 1e15  # steps; with STILL no average moves any more, and no start is left to correct
STILL = 1 - 1e-13


class Lion(Optimizer):
    """The published algorithm (arXiv 2302.06675, Algorithm 2), with the options of lion_pytorch's and timm's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})
        self._init_lr, self.decoupled_wd = lr, decoupled_weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (one, two), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"] / (self._init_lr if self.decoupled_wd else 1.0))
                p.sub_(lr * (one * m + (1 - one) * g).sign())
                m.mul_(two).add_((1 - two) * g)
        return loss


Lion.__module__ = "lion_pytorch.lion_pytorch"  # where the package defines it: rules are found by this name


@dataclass
class Case:
    """An optimizer, and states in which its element-wise scaling is the same for all elements and does not move.

    Attributes:
        kind: The class.
        options: Its options, for which the scaling stays.
        state: What to put into the state of every parameter.
    """

    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, float] = field(default_factory=dict)

    def make(self, parameters: Any, **options: Any) -> Optimizer:
        return self.kind(parameters, **{**self.options, **options})

    def frozen(self, parameters: list[nn.Parameter], **options: Any) -> Optimizer:
        optimizer = self.make(parameters, **options)
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, old in zip(parameters, before, strict=True):
            p.data.copy_(old)
            for name, value in self.state.items():
                kept = optimizer.state[p][name]
                optimizer.state[p][name] = torch.full_like(kept, value, dtype=torch.float64)
        return optimizer


MOMENTS = {"exp_avg": 0.0, "exp_avg_sq": 0.09, "step": LONG_AGO}
MEANS = {"betas": (0.8, STILL), "eps": 0.02}
SQUARES = {"square_avg": 0.09, "step": LONG_AGO}
LINEAR: dict[str, Case] = {  # a step is linear in the gradient while the scaling does not move
    "Adam": Case(torch.optim.Adam, MEANS, MOMENTS),
    "Adam, amsgrad": Case(torch.optim.Adam, {**MEANS, "amsgrad": True}, {**MOMENTS, "max_exp_avg_sq": 0.16}),
    "AdamW, foreach": Case(torch.optim.AdamW, {**MEANS, "foreach": True}, MOMENTS),
    "AdamW, fused": Case(torch.optim.AdamW, {**MEANS, "fused": True}, MOMENTS),
    "NAdam": Case(torch.optim.NAdam, MEANS, {**MOMENTS, "mu_product": 0.0}),
    "NAdam, decoupled": Case(
        torch.optim.NAdam, {**MEANS, "decoupled_weight_decay": True}, {**MOMENTS, "mu_product": 0.0}
    ),
    "RAdam": Case(torch.optim.RAdam, MEANS, MOMENTS),
    "RAdam, decoupled": Case(torch.optim.RAdam, {**MEANS, "decoupled_weight_decay": True}, MOMENTS),
    "Adamax": Case(torch.optim.Adamax, MEANS, {"exp_avg": 0.0, "exp_inf": 0.3, "step": LONG_AGO}),
    "RMSprop": Case(torch.optim.RMSprop, {"alpha": STILL, "eps": 0.02}, SQUARES),
    "RMSprop, momentum": Case(
        torch.optim.RMSprop, {"alpha": STILL, "eps": 0.02, "momentum": 0.8}, {**SQUARES, "momentum_buffer": 0.0}
    ),
    "RMSprop, centered": Case(
        torch.optim.RMSprop, {"alpha": STILL, "eps": 0.02, "centered": True}, {**SQUARES, "grad_avg": 0.2}
    ),
    "Adagrad": Case(torch.optim.Adagrad, {"eps": 0.02}, {"sum": 0.09, "step": 1e9}),
    "Adagrad, lr_decay": Case(torch.optim.Adagrad, {"eps": 0.02, "lr_decay": 1e-9}, {"sum": 0.09, "step": 1e9}),
    "Adadelta": Case(torch.optim.Adadelta, {"rho": STILL, "eps": 0.02}, {**SQUARES, "acc_delta": 0.01}),
    "ASGD": Case(torch.optim.ASGD, {"lambd": 0.0}, {"eta": 0.03}),
    "SGD": Case(torch.optim.SGD, {"momentum": 0.8}, {"momentum_buffer": 0.0}),
}
NONLINEAR: dict[str, Case] = {
    "Lion": Case(Lion, {"betas": (0.9, 0.5)}),
    "Rprop": Case(torch.optim.Rprop, {"step_sizes": (1e-6, 0.02)}),
}
if hasattr(torch.optim, "Adafactor"):
    variances = {"row_var": 0.09, "col_var": 0.09, "step": 10.0}
    LINEAR["Adafactor"] = Case(torch.optim.Adafactor, {"beta2_decay": -50.0}, variances)
if hasattr(torch.optim, "Muon"):
    NONLINEAR["Muon"] = Case(torch.optim.Muon, {"momentum": 0.9, "weight_decay": 0.0})


def grads(optimizer: Optimizer, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Sets every parameter's gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = make(p)
