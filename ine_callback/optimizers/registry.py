"""What a step does with a gradient: the rule of each optimizer, and how to register one for another optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.optimizers.joint import AnyOptimizer, JointOptimizer, each_of, owner_of

Group = dict[str, Any]  # one of an optimizer's param_groups


@dataclass(frozen=True)
class Rate:
    """How fast one block of parameters moves.

    The rest of training multiplies a change of the weights by the discount ``exp(-R F)``, with the Fisher F and the
    summed learning rate R that remains. ``curvature`` and ``decay`` say how R and weight decay enter that exponent.

    Attributes:
        lr: Learning rate of the parameter group.
        step: Effective learning rate of the coming step: the sum of a gradient's future effects through the momentum
            buffer, lr / (1 - momentum) for SGD, lr for Adam.
        curvature: What a unit of summed learning rate contributes to the discount's exponent: 1 / (1 - momentum) for
            SGD, one scalar 1 / (rms(v) + eps) for each block under Adam (element-wise scaling destroys the ranking,
            see docs/methods/fine.md).
        decay: What a unit of summed learning rate contributes to it through weight decay.
        weight: Factor of a gradient contribution in a step of size ``step``: Adam's scalar, 1 for SGD.
    """

    lr: float
    step: float
    curvature: Tensor | float
    decay: Tensor | float
    weight: Tensor | float = 1.0


class UpdateRule:
    """What an optimizer's step does with a gradient. This class itself is plain SGD without weight decay.

    Subclass it, override what differs and register the subclass with :func:`register_optimizer`.

    Attributes:
        rate_options: Options of a parameter group that decide how fast its parameters move. Weight decay is not among
            them: biases are often left out of it.
    """

    rate_options: tuple[str, ...] = ("lr", "initial_lr", "momentum", "betas")

    def rate(
        self, optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter], unscale: Tensor | float
    ) -> Rate:
        """The rate of one block's parameters.

        Args:
            optimizer: The optimizer, for its state.
            group: The parameter group of the block's first parameter.
            parameters: The block's parameters.
            unscale: Factor that undoes the scaling of the present gradients under mixed precision.
        """
        return Rate(float(group["lr"]), self.step(group), 1.0, 0.0)

    def step(self, group: Group) -> float:
        """Effective learning rate of a parameter group's coming step, see :attr:`Rate.step`."""
        return signed_lr(group)

    def same_rate(self, first: Group, second: Group) -> bool:
        """Whether the parameters of two groups move at one rate."""
        return all(first.get(option) == second.get(option) for option in self.rate_options)


PLAIN_SGD = UpdateRule()
_RULES: dict[type[Optimizer] | str, UpdateRule] = {}


def register_optimizer(*types: type[Optimizer] | str) -> Callable[[type[UpdateRule]], type[UpdateRule]]:
    """Registers the decorated :class:`UpdateRule` for optimizer classes and their subclasses.

    The rule of the nearest class counts. An optimizer without a rule is treated as plain SGD, and the report says so.

    Args:
        types: The classes. One of a package that need not be installed is named by package and class,
            ``"lion_pytorch.Lion"``, in whichever of the package's modules it is defined.

    Raises:
        TypeError: If one of ``types`` is neither an optimizer class nor such a name, or the decorated object is not an
            ``UpdateRule``.

    Example:
        >>> import torch
        >>> from ine_callback import register_optimizer
        >>> from ine_callback.optimizers import Rate, UpdateRule
        >>> class SignSGD(torch.optim.Optimizer):
        ...     def __init__(self, parameters, lr):
        ...         super().__init__(parameters, {"lr": lr})
        >>> @register_optimizer(SignSGD)
        ... class SignRule(UpdateRule):
        ...     def rate(self, optimizer, group, parameters, unscale):
        ...         # sign(g) is taken as g / mean |g|, one scalar for the block
        ...         scale = 1 / (torch.cat([p.grad.flatten() for p in parameters]) * unscale).abs().mean()
        ...         return Rate(group["lr"], self.step(group), curvature=scale, decay=0.0, weight=scale)
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.5, -1.5])
        >>> rate_of(SignSGD([weight], lr=0.1), [weight])
        Rate(lr=0.1, step=0.1, curvature=tensor(1.), decay=0.0, weight=tensor(1.))
    """
    for kind in types:
        named = isinstance(kind, str) and all(part.isidentifier() for part in kind.split(".")) and "." in kind
        if not named and not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise TypeError(
                f"register_optimizer: {kind!r} is not a class of torch.optim.Optimizer; pass its class, or the name of "
                "its package and class with a dot between them."
            )

    def decorate(rule: type[UpdateRule]) -> type[UpdateRule]:
        if not (isinstance(rule, type) and issubclass(rule, UpdateRule)):
            raise TypeError(f"register_optimizer: {rule!r} is not a subclass of UpdateRule.")
        for kind in types:
            _RULES[kind] = rule()
        return rule

    return decorate


def known(optimizer: Optimizer) -> bool:
    """Whether a rule is registered for the optimizer; others are treated as plain SGD."""
    return _registered(optimizer) is not None


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The rule of the nearest registered class; plain SGD where there is none."""
    return _registered(optimizer) or PLAIN_SGD


def _registered(optimizer: Optimizer) -> UpdateRule | None:
    names = [name for name in _RULES if isinstance(name, str)]
    for kind in optimizer.__class__.__mro__:
        if kind in _RULES:
            return _RULES[kind]
        for name in names:
            if _is_named(kind, name):
                return _RULES[name]
    return None


def _is_named(kind: type, name: str) -> bool:
    """Whether a class is the one of this name, in the named package or a module in it.

    Example:
        >>> import torch
        >>> [_is_named(torch.optim.SGD, name) for name in ("torch.optim.SGD", "torch.SGD", "torch.opt.SGD")]
        [True, True, False]
    """
    package, _, own = name.rpartition(".")
    return kind.__qualname__ == own and f"{kind.__module__}.".startswith(f"{package}.")


def rate_of(optimizer: AnyOptimizer, parameters: Sequence[nn.Parameter], unscale: Tensor | float = 1.0) -> Rate:
    """The rate of a block's parameters (its first parameter decides the optimizer and the parameter group).

    Args:
        optimizer: Any torch optimizer, or several.
        parameters: The block's parameters.
        unscale: Factor that undoes the scaling of the present gradients under mixed precision.
    """
    own = owner_of(optimizer, parameters[0])
    group = None if own is None else _group_of(own, parameters[0])
    if own is None or group is None:
        return Rate(0.0, 0.0, 0.0, 0.0)
    return rule_of(own).rate(own, group, parameters, unscale)


def same_rate(optimizer: AnyOptimizer, a: nn.Parameter, b: nn.Parameter) -> bool:
    """Whether two parameters move at one rate, and in the same steps; those that no optimizer has all do."""
    own = owner_of(optimizer, a)
    if own is not owner_of(optimizer, b):
        return False
    if own is None:
        return True
    first, second = _group_of(own, a), _group_of(own, b)
    if first is None or second is None:
        return first is second
    return rule_of(own).same_rate(first, second)


def step_rate(optimizer: Optimizer) -> float:
    """Effective learning rate of the first parameter group's coming step, see :attr:`Rate.step`."""
    return rule_of(optimizer).step(optimizer.param_groups[0])


def own_step_rate(optimizer: AnyOptimizer, parameter: nn.Parameter) -> float:
    """The same of the optimizer that has the parameter; of the first one where none has.

    Example:
        >>> import torch
        >>> one, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> optimizers = [torch.optim.SGD([one], lr=0.1, momentum=0.5), torch.optim.Adam([other], lr=0.01)]
        >>> own_step_rate(JointOptimizer(optimizers), one), own_step_rate(JointOptimizer(optimizers), other)
        (0.2, 0.01)
    """
    return step_rate(owner_of(optimizer, parameter) or each_of(optimizer)[0])


def relative_lr(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> float:
    """Signed learning rate of a block's group relative to the first group's, at the start where a schedule ended at 0.

    Example:
        >>> import torch
        >>> one, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other], "lr": 0.3}], lr=0.1)
        >>> round(relative_lr(optimizer, [other]), 3)
        3.0
    """
    group, first = _group_of(optimizer, parameters[0]), optimizer.param_groups[0]
    if group is None:
        return 0.0
    name = "lr" if float(first["lr"]) else "initial_lr"
    return signed_lr({**group, "lr": group.get(name, 1.0)}) / (float(first.get(name, 1.0)) or 1.0)


def remaining_lr(optimizer: AnyOptimizer, remaining: float, parameter: nn.Parameter, lr: float) -> float:
    """Summed learning rate that remains for a parameter.

    Args:
        optimizer: Any torch optimizer, or several: then the fraction of updates in which the parameter's own steps.
        remaining: That of the first parameter group of the first one.
        parameter: The parameter.
        lr: Its present learning rate.
    """
    first = float(optimizer.param_groups[0]["lr"])
    ahead = remaining * (lr / first if first else 1.0)
    own = owner_of(optimizer, parameter)
    return ahead * optimizer.activity(own) if isinstance(optimizer, JointOptimizer) and own is not None else ahead


def summed_rates(
    optimizer: AnyOptimizer, learning_rates: float, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor | float, Tensor | float]:
    """What a run adds to the exponent of the discount of a block, by curvature and by weight decay.

    Args:
        optimizer: Any torch optimizer, as the run left it; or several, which have counted their own steps.
        learning_rates: Sum over the run's steps of the first group's learning rate; not used of several.
        parameters: The block's parameters.

    Example:
        >>> import torch
        >>> one = torch.nn.Parameter(torch.zeros(1))
        >>> summed_rates(torch.optim.SGD([one], lr=0.1, momentum=0.5), 20.0, [one])
        (40.0, 0.0)
    """
    own = owner_of(optimizer, parameters[0])
    if own is None:
        return 0.0, 0.0
    if isinstance(optimizer, JointOptimizer):
        learning_rates = optimizer.summed[optimizer.each.index(own)]
    rate, summed = rate_of(own, parameters), learning_rates * relative_lr(own, parameters)
    return summed * rate.curvature, summed * rate.decay


def signed_lr(group: Group) -> float:
    """The group's learning rate; negative if it climbs, which raises what a gradient contribution would have lowered.

    Example:
        >>> signed_lr({"lr": 0.1}), signed_lr({"lr": 0.1, "maximize": True})
        (0.1, -0.1)
    """
    return (-1.0 if group.get("maximize") else 1.0) * float(group["lr"])


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> Group | None:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None
