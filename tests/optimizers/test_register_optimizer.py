"""Registered optimizers, also from outside of the package, and the rates of parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ine_callback import register_optimizer
from ine_callback.optimizers import Rate, UpdateRule, registry
from ine_callback.optimizers.registry import Group, known, rate_of, rule_of, same_rate, step_rate
from ine_callback.optimizers.sgd import SGDRule


class Tripled(Optimizer):
    """p <- p - 3 lr grad, with decoupled weight decay."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(3 * group["lr"] * p.grad)


class TripledRule(UpdateRule):
    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        return Rate(group["lr"], self.step(group), curvature=3.0, decay=group["weight_decay"])

    def step(self, group: Group) -> float:
        return 3 * group["lr"]


class SignSGD(Optimizer):
    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})


class SignRule(UpdateRule):
    """sign(g) is taken as g / mean |g|."""

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        scale = 1 / (torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]) * unscale).abs().mean()
        return Rate(group["lr"], self.step(group), curvature=scale, decay=0.0, weight=scale)


@pytest.fixture(autouse=True)
def _restored_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_a_registered_rule_gives_the_hand_computed_rate() -> None:
    register_optimizer(SignSGD)(SignRule)
    a, b = parameter(0.0, 0.0), parameter(0.0)
    a.grad, b.grad = torch.tensor([1.0, -3.0]).double(), torch.tensor([8.0]).double()
    optimizer = SignSGD([a, b], lr=0.1)
    rate = rate_of(optimizer, [a, b], unscale=0.5)  # mean of .5, 1.5 and 4: 2
    assert (rate.lr, rate.step, rate.decay) == (0.1, 0.1, 0.0)
    assert float(rate.curvature) == float(rate.weight) == 0.5
    assert known(optimizer)


def test_a_registered_rules_rate_is_what_the_optimizers_steps_do() -> None:
    """The effect of one gradient, and how fast a perturbation fades on a quadratic of curvature h."""
    register_optimizer(Tripled)(TripledRule)
    p = parameter(0.0)
    optimizer = Tripled([p], lr=0.2)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert rate_of(optimizer, [p]).step == step_rate(optimizer) == pytest.approx(-p.item())
    lr, h, steps, w = 1e-5, 2.0, 2000, parameter(1.0)
    optimizer = Tripled([w], lr=lr, weight_decay=0.5)
    rate = rate_of(optimizer, [w])
    for _ in range(steps):
        w.grad = h * w.detach()
        optimizer.step()
    assert -w.log().item() / (lr * steps) == pytest.approx(h * float(rate.curvature) + float(rate.decay), rel=1e-3)


def test_a_subclass_has_the_rule_of_its_base() -> None:
    class MySGD(SGD):
        pass

    p = parameter(0.0)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}
    assert known(MySGD([p], **options))
    assert rate_of(MySGD([p], **options), [p]) == rate_of(SGD([p], **options), [p])


def test_the_rule_of_the_nearest_class_counts() -> None:
    class Ours(SGD):
        pass

    class OursToo(Ours):
        pass

    register_optimizer(Ours)(TripledRule)
    p = [parameter(0.0)]
    assert isinstance(rule_of(OursToo(p, lr=0.1)), TripledRule)
    assert isinstance(rule_of(SGD(p, lr=0.1)), SGDRule)
    assert rate_of(OursToo(p, lr=0.1, momentum=0.5), p).step == pytest.approx(0.3)


def test_only_optimizer_classes_and_update_rules_can_be_registered() -> None:
    with pytest.raises(TypeError, match=r"register_optimizer.*not a class of torch.optim.Optimizer"):
        register_optimizer(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not a subclass of UpdateRule"):
        register_optimizer(Tripled)(TripledRule())  # type: ignore[arg-type]


def test_parameter_groups_have_their_own_rates() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = SGD([{"params": [a]}, {"params": [b], "lr": 0.5, "momentum": 0.5}], lr=0.1)
    assert rate_of(optimizer, [a]).step == 0.1
    assert rate_of(optimizer, [b]).step == pytest.approx(1.0)
    assert rate_of(optimizer, [c]).step == 0.0
    assert not same_rate(optimizer, a, b) and not same_rate(optimizer, a, c) and same_rate(optimizer, a, a)


def test_an_optimizer_without_a_rule_is_treated_as_plain_sgd() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    assert known(SGD(p)) and known(Adam(p)) and known(AdamW(p))
    other = torch.optim.LBFGS(p, lr=0.2)
    assert not known(other)
    assert rate_of(other, p).step == 0.2 and rate_of(other, p).curvature == 1.0


def test_a_class_of_a_package_that_is_not_installed_is_registered_by_its_name() -> None:
    register_optimizer("absent_package.optim.Tripled")(TripledRule)
    p = [parameter(0.0)]
    for module, found in {
        "absent_package.optim": True,
        "absent_package.optim.tripled": True,
        "absent_package": False,
        "absent_package.optimizers": False,
        "other.absent_package.optim": False,
    }.items():
        kind = type("Tripled", (Tripled,), {"__module__": module})
        assert known(kind(p, lr=0.1)) is found, module
    kind = type("Ours", (type("Tripled", (Tripled,), {"__module__": "absent_package.optim"}),), {})
    assert isinstance(rule_of(kind(p, lr=0.1)), TripledRule)  # its base has the name
    with pytest.raises(TypeError, match=r"'Tripled' is not a class.*name of its package and class"):
        register_optimizer("Tripled")
