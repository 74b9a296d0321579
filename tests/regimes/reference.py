"""The reference: a plain loop in one process that trains by the gradients of single rows and sums up f-INE by hand.

It shares nothing with the package but the formulas of docs/methods/fine.md: no Trainer, no capture, no discount, first
weights taken as fixed. Only the order of events (which rows, which steps were taken, at which rates) is the real run's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .regime import Classifier, Data, Regime, converted
from .shares import Shares, alone, among, gradient


@dataclass
class Event:
    """Something that happened in a real run.

    Attributes:
        kind: ``backward`` of a batch, an applied optimizer ``step``, gradients set to ``zero``, the ``end`` of a batch.
        rows: Rows of the batch.
        random: State of torch's random numbers before the batch's forward pass.
        groups: Settings of the parameter groups of all optimizers (learning rate, momentum).
        trainable: Names of the parameters that had a gradient to come.
        optimizer: Which one took the step, or removed its gradients; None: all.
        loss: Which of the module's losses was differentiated.
        accumulate: Batches of a step, where that changes.
        counts: Whether the batch is recorded; a batch that uses parameters as none before is trained on alone.
    """

    kind: Literal["backward", "step", "zero", "end"]
    rows: list[int] = field(default_factory=list)
    random: Tensor | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    trainable: frozenset[str] = frozenset()
    optimizer: int | None = None
    loss: str = "loss"
    accumulate: int | None = None
    counts: bool = True


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
    clip = options.get("gradient_clip_val") or module.clip
    by_value = options.get("gradient_clip_algorithm") == "value"
    accumulate = options.get("accumulate_grad_batches", 1) * parts
    loop = _Loop(regime, module, data, module.made_optimizers(), accumulate)
    for event in events:
        if event.kind == "zero":
            loop.zero(event)
        elif event.kind == "end":
            loop.end()
        elif event.kind == "backward":
            loop.backward(event)
        else:
            loop.step(event, clip, by_value)
    return loop.sums.scores(), module


def _thaw(module: Classifier, event: Event) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in event.trainable)


Signals = dict[nn.Parameter, Tensor]


@dataclass
class _Pass:
    """A backward pass: its rows, and for each parameter that a step may still take the signals and squared unit."""

    rows: list[int]
    signals: Signals  # [b, 2]
    squares: Signals  # [b]: of self-influence


class _Loop:
    def __init__(
        self, regime: Regime, module: Classifier, data: Data, optimizers: list[torch.optim.Optimizer], accumulate: int
    ) -> None:
        self.regime, self.module, self.data = regime, module, data
        self.optimizers, self.accumulate = optimizers, accumulate
        self.several = len(optimizers) > 1
        self.sums = Sums(len(data.items))
        self.val = converted(next(iter(data.val)), regime.dtype)
        self.pending: list[_Pass] = []
        self.taken: list[_Pass] = []  # by the steps of several optimizers in one batch, times the steps' rates
        self.direction: dict[nn.Parameter, Tensor] = {}
        self.weights: dict[nn.Parameter, float] = {}
        self.joined: set[nn.Parameter] = set()  # parameters that have a direction
        self.stepped: set[int] = set()
        self.steps = 0
        self.fresh = True  # whether a batch's first pass comes
        self.names = dict(module.named_parameters())

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _own(self, k: int | None) -> set[nn.Parameter]:
        """The parameters of one optimizer; of a single one all there are."""
        if k is None or not self.several:
            return set(self.names.values())
        return {p for group in self.optimizers[k].param_groups for p in group["params"]}

    def zero(self, event: Event) -> None:
        own = self._own(event.optimizer)
        for p in own:
            p.grad = None
        if (
            self.several
            and event.optimizer not in self.stepped
            and any(own & one.signals.keys() for one in self.pending)
        ):
            self.joined -= own  # what a direction was made of, no step took
        self._forget(own)

    def _forget(self, own: set[nn.Parameter]) -> None:
        for one in self.pending:
            for p in own & one.signals.keys():
                del one.signals[p], one.squares[p]
        self.pending = [one for one in self.pending if one.signals]

    def backward(self, event: Event) -> None:
        _thaw(self.module, event)
        known = {p for group in self.groups for p in group["params"]}
        thawed = [p for p in self.names.values() if p.requires_grad and p not in known]
        if thawed:
            self.optimizers[0].add_param_group({"params": thawed})
        self._set(event)
        self.accumulate = event.accumulate or self.accumulate
        begins = self.fresh if self.several else not self.pending
        if self.stepped and begins:  # before the first step the direction comes after the backward pass
            self._aim()
        self.fresh = False
        shares = self._shares(event)
        new = {p for share in shares for p in share}
        for parameter in new:
            total = torch.stack([share[parameter] for share in shares if parameter in share]).sum(0)
            parameter.grad = total if parameter.grad is None else parameter.grad + total
        if (penalty := self.module.of_no_row()) is not None:
            for parameter, g in gradient(self.module, penalty / self.accumulate).items():
                parameter.grad = g if parameter.grad is None else parameter.grad + g
        if not event.counts:
            return
        if (self.several and not new <= self.joined) or (not self.stepped and not self.pending):
            self.joined |= new
            self._aim()
        self.pending.append(self._signals(event.rows, shares))

    def _aim(self) -> None:
        self.direction, self.weights = self._gradient(), self._weights()
        if self.several:
            self.direction = {p: g for p, g in self.direction.items() if p in self.joined}

    def _set(self, event: Event) -> None:
        for group, settings in zip(self.groups, event.groups, strict=True):
            group.update(settings)

    def _shares(self, event: Event) -> Shares:
        items = [self.data.items[row] for row in event.rows]
        batch = converted(self.data.collate(items), self.regime.dtype)
        loss = getattr(self.module, event.loss)
        if self.regime.shares == "among":
            return among(self.module, loss, batch, len(items), event.random, self.accumulate)
        singles = [converted(self.data.collate([item]), self.regime.dtype) for item in items]
        terms = torch.tensor([self.module.terms(single) for single in singles]).double()
        return alone(self.module, loss, singles, (terms / terms.sum() / self.accumulate).tolist())

    def _gradient(self) -> dict[nn.Parameter, Tensor]:
        """The gradient of the query ``val`` at the present weights, in evaluation mode."""
        modes = [(m, m.training) for m in self.module.modules()]
        learns = [(p, p.requires_grad) for p in self.names.values()]
        self.module.eval()
        if self.several:  # one optimizer's turn freezes the others' parameters
            self.module.requires_grad_(True)
        try:
            return gradient(self.module, self.module.loss(copy.deepcopy(self.val)))
        finally:
            for p, learned in learns:
                p.requires_grad_(learned)
            for m, mode in modes:
                m.training = mode

    def _signals(self, rows: list[int], shares: Shares) -> _Pass:
        """Each parameter's signals [b, 2], and its part of the squared unit of self-influence."""
        weights, b = self.weights, len(rows) * self.accumulate
        named = {p for name, p in self.names.items() if name not in self.regime.left_out}
        v = {p: g for p, g in self.direction.items() if p in named}
        there = {p for share in shares for p in share} & named
        signals = {p: torch.zeros(len(rows), 2).double() for p in there}
        squares = {p: torch.zeros(len(rows)).double() for p in there}
        for k, share in enumerate(shares):
            for p, g in share.items():
                if p in named:
                    square = float(g.square().sum())
                    signals[p][k, 0] = weights[p] * float((v[p] * g).sum()) if p in v else 0.0
                    signals[p][k, 1] = b * weights[p] * square
                    squares[p][k] = b**2 * square
        return _Pass(rows, signals, squares)

    def _units(self, rows: int, squares: Tensor) -> Tensor:
        """The units [b, 2] of rows with these squared units of self-influence."""
        named = {p for name, p in self.names.items() if name not in self.regime.left_out}
        val = sum(float(g.square().sum()) for p, g in self.direction.items() if p in named) ** 0.5
        units = torch.stack([torch.full((rows,), val).double(), squares.sqrt()], 1)
        return torch.where(units > 0, units, 1.0)

    def _weights(self) -> dict[nn.Parameter, float]:
        """How far a parameter moves, relative to its optimizer's first group: its rate, and Adam's layer scalar."""
        weights = dict.fromkeys(self.names.values(), 0.0)
        for optimizer in self.optimizers:
            first = _step(optimizer.param_groups[0])
            for group in optimizer.param_groups:
                weights |= {p: _step(group) / first if first else 1.0 for p in group["params"]}
            if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SparseAdam):
                self._scale(weights, optimizer)
        return weights

    def _scale(self, weights: dict[nn.Parameter, float], optimizer: torch.optim.Optimizer) -> None:
        """Adam's scalar of each of an optimizer's layers."""
        for layer in self._layers():
            group = next((g for g in optimizer.param_groups if any(p is layer[0] for p in g["params"])), None)
            moments = [_second_moment(optimizer, group, p) for p in layer] if group else []
            if group and all(m is not None for m in moments):
                mean = sum(float(m.sum()) for m in moments) / sum(m.numel() for m in moments)
                for p in layer:
                    weights[p] *= 1 / (mean**0.5 + group["eps"])

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
            parameters = [p for p in self.names.values() if p in self._own(event.optimizer)]
            if by_value:
                torch.nn.utils.clip_grad_value_(parameters, clip)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
        factors = self._factors(before)
        k = event.optimizer or 0
        optimizer, own = self.optimizers[k], self._own(k)
        rate = _step(optimizer.param_groups[0])
        for one in self.pending:
            mine = own & one.signals.keys()
            signals = {p: rate * factors.get(p, 1.0) * one.signals[p] for p in mine}
            if mine:
                self.taken.append(_Pass(one.rows, signals, {p: one.squares[p] for p in mine}))
                self.stepped.add(k)
        self._forget(own)
        _step_of(optimizer)
        self.steps += 1
        self.module.after_step(self.steps)
        if not self.several:
            self.end()

    def end(self) -> None:
        """What was taken is one observation; of several optimizers, where a batch ends."""
        self.fresh = True
        batches: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        for one in self.taken:
            none = torch.zeros(len(one.rows), 2).double(), torch.zeros(len(one.rows)).double()
            signals, squares = batches.get(tuple(one.rows), none)
            signals, squares = signals + sum(one.signals.values()), squares + sum(one.squares.values())
            batches[tuple(one.rows)] = signals, squares
        rows = [row for batch in batches for row in batch]
        if rows:
            signals, squares = (torch.cat(parts) for parts in zip(*batches.values(), strict=True))
            self.sums.fold(rows, signals, 1.0 if bool(signals.any()) else 0.0, self._units(len(rows), squares))
        self.taken.clear()


def gradient_of(layer: tuple[nn.Parameter, ...], grads: dict[nn.Parameter, Tensor]) -> Tensor:
    return torch.cat([grads[p].flatten().double() for p in layer if p in grads])


def _step(group: dict[str, Any]) -> float:
    momentum = group.get("momentum", 0.0)
    gain = (1 - group["dampening"]) / (1 - momentum) if momentum else 1.0
    return float(group["lr"]) * gain


def _step_of(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.SparseAdam):
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            dense, p.grad = p.grad, None
            p.grad = dense.to_sparse(1)
    optimizer.step()


def _second_moment(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: nn.Parameter) -> Tensor | None:
    """Bias-corrected, or the first squared gradient; of SparseAdam, of the elements that ever had a gradient."""
    state = optimizer.state.get(p)
    if state:
        found = state["exp_avg_sq"].float() / (1 - group["betas"][1] ** float(state["step"]))
    elif p.grad is None:
        return None
    else:
        found = p.grad.to_dense().float().square()
    return found[found > 0] if isinstance(optimizer, torch.optim.SparseAdam) else found
