"""The reference: a plain loop in one process that trains by the gradients of single rows and sums up f-INE by hand.

It shares nothing with the package but the formulas of docs/methods/fine.md: no Trainer, no capture, no discount, first
weights taken as fixed. Only the order of events (which rows, which steps were taken, at which rates) is the real run's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .regime import Classifier, Data, Regime, converted

Shares = list[dict[nn.Parameter, Tensor]]


@dataclass
class Event:
    """Something that happened in a real run.

    Attributes:
        kind: ``backward`` of a batch, an applied optimizer ``step``, gradients set to ``zero``.
        rows: Rows of the batch.
        random: State of torch's random numbers before the batch's forward pass.
        groups: Settings of the optimizer's parameter groups (learning rate, momentum).
        trainable: Names of the parameters that had a gradient to come.
        accumulate: Batches of a step, where that changes.
    """

    kind: Literal["backward", "step", "zero"]
    rows: list[int] = field(default_factory=list)
    random: Tensor | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    trainable: frozenset[str] = frozenset()
    accumulate: int | None = None


class Sums:
    """f-INE's sums for two queries, ``val`` and ``self``, first weights fixed (docs/methods/fine.md)."""

    def __init__(self, rows: int) -> None:
        self.shift, self.noise = torch.zeros(rows, 2).double(), torch.zeros(2).double()
        self.own, self.visits, self.seen = (torch.zeros(rows).double() for _ in range(3))

    def fold(self, rows: list[int], signals: Tensor, rate: float, units: Tensor) -> None:
        """One step: signals and units [b, 2]."""
        b = len(rows)
        self.seen[rows] = 1
        if b < 2 or rate == 0:
            return
        moved = rate * signals.double() / units.double()
        d = moved - (moved.sum(0) - moved) / (b - 1)  # against the mean of the others
        self.noise += (moved - moved.mean(0)).square().sum(0) * b / (b - 1)
        level = moved[:, 1].mean().abs()
        d[:, 1] /= level
        for row, change in zip(rows, d, strict=True):
            self.shift[row] += change
            self.own[row] += level
            self.visits[row] += 1

    def scores(self) -> Tensor:
        mu = self.shift / self.noise.sqrt() / self.seen[:, None]  # NaN for rows without a visit
        mu[:, 1] *= self.own / self.visits
        return mu


def replay(
    regime: Regime, first: Classifier, data: Data, events: list[Event], parts: int = 1
) -> tuple[Tensor, Classifier]:
    """Trains ``first`` once more by the events; returns the scores [N, 2] and the trained module.

    A batch may come in several equal ``parts``, each with a backward event of its own.
    """
    module = copy.deepcopy(first).to(regime.dtype).train()
    regime.plain_form(module)
    _thaw(module, next(event for event in events if event.kind == "backward"))
    options = regime.trainer()
    optimizer = module._optimizer(module.parameters_to_train())
    clip = options.get("gradient_clip_val")
    by_value = options.get("gradient_clip_algorithm") == "value"
    loop = _Loop(regime, module, data, optimizer, options.get("accumulate_grad_batches", 1) * parts)
    for event in events:
        if event.kind == "zero":
            loop.zero()
        elif event.kind == "backward":
            loop.backward(event)
        else:
            loop.step(event, clip, by_value)
    return loop.sums.scores(), module


def _thaw(module: Classifier, event: Event) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in event.trainable)


class _Loop:
    def __init__(
        self, regime: Regime, module: Classifier, data: Data, optimizer: torch.optim.Optimizer, accumulate: int
    ) -> None:
        self.regime, self.module, self.data = regime, module, data
        self.optimizer, self.accumulate = optimizer, accumulate
        self.sums = Sums(len(data.items))
        self.val = converted(next(iter(data.val)), regime.dtype)
        self.pending: list[tuple[list[int], dict[nn.Parameter, Tensor], Tensor]] = []
        self.direction: dict[nn.Parameter, Tensor] = {}
        self.weights: dict[nn.Parameter, float] = {}
        self.stepped = False
        self.names = dict(module.named_parameters())

    def zero(self) -> None:
        self.optimizer.zero_grad()
        self.pending.clear()

    def backward(self, event: Event) -> None:
        _thaw(self.module, event)
        known = {p for group in self.optimizer.param_groups for p in group["params"]}
        thawed = [p for p in self.names.values() if p.requires_grad and p not in known]
        if thawed:
            self.optimizer.add_param_group({"params": thawed})
        self._set(event)
        self.accumulate = event.accumulate or self.accumulate
        if self.stepped and not self.pending:  # before the first step the direction comes after the backward pass
            self.direction, self.weights = self._gradient(), self._weights()
        shares = self._shares(event)
        for parameter in self.names.values():
            parts = [share[parameter] for share in shares if parameter in share]
            if parts:
                total = torch.stack(parts).sum(0)
                parameter.grad = total if parameter.grad is None else parameter.grad + total
        if not self.stepped and not self.pending:
            self.direction, self.weights = self._gradient(), self._weights()
        self.pending.append(self._signals(event.rows, shares))

    def _set(self, event: Event) -> None:
        for group, settings in zip(self.optimizer.param_groups, event.groups, strict=True):
            group.update(settings)

    def _shares(self, event: Event) -> Shares:
        items = [self.data.items[row] for row in event.rows]
        batch = converted(self.data.collate(items), self.regime.dtype)
        if self.regime.shares == "among":
            return among(self.module, batch, len(items), event.random, self.accumulate)
        singles = [converted(self.data.collate([item]), self.regime.dtype) for item in items]
        terms = torch.tensor([self.module.terms(single) for single in singles]).double()
        return alone(self.module, singles, (terms / terms.sum() / self.accumulate).tolist())

    def _gradient(self) -> dict[nn.Parameter, Tensor]:
        """The gradient of the query ``val`` at the present weights, in evaluation mode."""
        modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        try:
            return gradient(self.module, self.module.loss(self.val))
        finally:
            for m, mode in modes:
                m.training = mode

    def _signals(self, rows: list[int], shares: Shares) -> tuple[list[int], dict[nn.Parameter, Tensor], Tensor]:
        """Each parameter's signals [b, 2], and the units [b, 2]."""
        weights, b = self.weights, len(rows) * self.accumulate
        named = {p for name, p in self.names.items() if name not in self.regime.left_out}
        v = {p: g for p, g in self.direction.items() if p in named}
        signals = {p: torch.zeros(len(rows), 2).double() for p in named}
        units = torch.zeros(len(rows), 2).double()
        for k, share in enumerate(shares):
            own = {p: g for p, g in share.items() if p in named}
            for p, g in own.items():
                signals[p][k, 0] = weights[p] * float((v[p] * g).sum()) if p in v else 0.0
                signals[p][k, 1] = b * weights[p] * float(g.square().sum())
            units[k, 1] = b * sum(float(g.square().sum()) for g in own.values()) ** 0.5
        units[:, 0] = sum(float(g.square().sum()) for g in v.values()) ** 0.5
        return rows, signals, torch.where(units > 0, units, 1.0)

    def _weights(self) -> dict[nn.Parameter, float]:
        """How far a parameter moves, relative to the first group's step: its group's rate, and Adam's layer scalar."""
        first = _step(self.optimizer.param_groups[0])
        rates = {p: _step(g) / first if first else 1.0 for g in self.optimizer.param_groups for p in g["params"]}
        weights = {p: rates.get(p, 0.0) for p in self.names.values()}
        if not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            return weights
        for layer in self._layers():
            group = next((g for g in self.optimizer.param_groups if any(p is layer[0] for p in g["params"])), None)
            moments = [_second_moment(self.optimizer, group, p) for p in layer] if group else []
            if group and all(m is not None for m in moments):
                mean = sum(float(m.sum()) for m in moments) / sum(p.numel() for p in layer)
                for p in layer:
                    weights[p] *= 1 / (mean**0.5 + group["eps"])
        return weights

    def _factors(self, before: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, float]:
        """By how much each layer's gradient was clipped: what is left of it in its own direction."""
        factors: dict[nn.Parameter, float] = {}
        for layer in self._layers():
            if any(p in before for p in layer):
                now = {p: p.grad for p in before if p.grad is not None}
                a, b = gradient_of(layer, before), gradient_of(layer, now)
                size = float(a @ a)
                factors.update(dict.fromkeys(layer, float(a @ b) / size if size else 1.0))
        return factors

    def _layers(self) -> Iterator[tuple[nn.Parameter, ...]]:
        """A layer's weight and bias share one scalar."""
        for child in self.module.modules():
            own = tuple(child.parameters(recurse=False))
            if isinstance(child, nn.Linear | nn.Conv2d):
                yield own
            else:
                yield from ((p,) for p in own)

    def step(self, event: Event, clip: float | None, by_value: bool) -> None:
        self._set(event)
        before = {p: p.grad.clone() for p in self.names.values() if p.grad is not None}
        if clip and before:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            if by_value:
                torch.nn.utils.clip_grad_value_(parameters, clip)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
        factors = self._factors(before)
        if self.pending:
            rows = [row for part, _, _ in self.pending for row in part]
            parts = [sum(factors.get(p, 1.0) * c for p, c in found.items()) for _, found, _ in self.pending]
            signals, units = torch.cat(parts), torch.cat([part for *_, part in self.pending])
            self.stepped = True
            self.sums.fold(rows, signals, _step(self.optimizer.param_groups[0]), units)
        self.pending.clear()
        self.optimizer.step()


def gradient_of(layer: tuple[nn.Parameter, ...], grads: dict[nn.Parameter, Tensor]) -> Tensor:
    return torch.cat([grads[p].flatten().double() for p in layer if p in grads])


def gradient(module: nn.Module, loss: Tensor) -> dict[nn.Parameter, Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {p: g.detach() for p, g in zip(parameters, found, strict=True) if g is not None}


def alone(module: Classifier, singles: list[Any], coefficients: list[float]) -> Shares:
    """Each row's gradient from a pass of its own, times its part of the batch's loss."""
    return [
        {p: g * c for p, g in gradient(module, module.loss(single)).items()}
        for single, c in zip(singles, coefficients, strict=True)
    ]


def among(module: Classifier, batch: Any, rows: int, random: Tensor | None, accumulate: int) -> Shares:
    """Each row's share from passes of the whole batch in which only that row's use of the weights has a gradient."""
    assert random is not None
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    shares = []
    for k in range(rows):
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        torch.set_rng_state(random)
        with _only(module, k):
            shares.append({p: g / accumulate for p, g in gradient(module, module.loss(batch)).items()})
    return shares


@contextmanager
def _only(module: nn.Module, row: int) -> Iterator[None]:
    """Every layer's output of the other rows comes from weights without a gradient."""
    handles = []
    for child in module.modules():
        if isinstance(child, nn.RNNBase):  # left out, as it has dropout inside
            if row:  # its whole gradient counts once
                handles.append(child.register_forward_hook(lambda m, args, output: (output[0].detach(), output[1])))
        elif list(child.parameters(recurse=False)):
            hook: Callable[..., Tensor] = _mask(row)
            handles.append(child.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(row: int) -> Callable[..., Tensor]:
    inside = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if inside:
            return output
        inside.append(1)
        frozen = {name: p.detach() for name, p in module.named_parameters()}
        buffers = {name: b.clone() for name, b in module.named_buffers()}  # running statistics move once a batch
        other = functional_call(module, {**frozen, **buffers}, args)
        inside.pop()
        mine = torch.zeros(len(output), dtype=torch.bool)
        mine[row] = True
        return torch.where(mine.view(-1, *[1] * (output.dim() - 1)), output, other)

    return hook


def _step(group: dict[str, Any]) -> float:
    momentum = group.get("momentum", 0.0)
    gain = (1 - group["dampening"]) / (1 - momentum) if momentum else 1.0
    return float(group["lr"]) * gain


def _second_moment(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: nn.Parameter) -> Tensor | None:
    state = optimizer.state.get(p)
    if state:
        return state["exp_avg_sq"].float() / (1 - group["betas"][1] ** float(state["step"]))
    return None if p.grad is None else p.grad.float().square()
