"""What becomes of the gradients between the backward pass and the step, whoever does it: clipping first of all.

A row's share of a step is its share of what is in ``.grad`` when the step is taken. So gradients are measured when a
backward pass is over, and again before the optimizer (or a further pass) uses them. What lies between is taken as one
factor for each block, by norm and direction; it is exact where the gradients of a block were all scaled alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.capture import Block
from ine_callback.distributed.sharding import local

SAMPLE = 1024  # entries of each gradient that tell whether it kept its direction
_UNEVEN, _TURNED = 1e-2, 1e-4  # tolerances of factors and cosines: gradients may be in half precision


class Layout:
    """Where each parameter stands, and index tensors made once: to send them to a device would wait for it.

    Args:
        parameters: Those of the optimizer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.device = parameters, parameters[0].device
        self.steps = [(n // SAMPLE) | 1 for n in (local(p).numel() for p in parameters)]  # odd: no column of a matrix
        counts = [min(SAMPLE, -(-local(p).numel() // step)) for p, step in zip(parameters, self.steps, strict=True)]
        self.counts, self.zeros = counts, torch.zeros(SAMPLE, device=self.device)
        self.owners = torch.arange(len(parameters)).repeat_interleave(torch.tensor(counts)).to(self.device)
        self._places = {p: k for k, p in enumerate(parameters)}
        self._blocks: dict[tuple[Block, ...], Tensor] = {}

    def of_blocks(self, blocks: tuple[Block, ...]) -> Tensor:
        """Index [P] of each parameter's block; len(blocks) of those in none."""
        if blocks not in self._blocks:
            index = torch.full((len(self.parameters),), len(blocks))
            for k, block in enumerate(blocks):
                for p in block.parameters:
                    if p in self._places:
                        index[self._places[p]] = k
            self._blocks = {blocks: index.to(self.device)}
        return self._blocks[blocks]


@dataclass
class Change:
    """What was done to the gradients of P parameters, as sums over their elements.

    Attributes:
        moments: Squared norms before and after; of the sampled entries, squares before and after and products [5, P].
        layout: Which parameters.
    """

    moments: Tensor
    layout: Layout

    def factors(self, blocks: tuple[Block, ...]) -> Tensor:
        """One factor for each block [K]; that of all gradients together where a block had none before."""
        sums = self.moments.new_zeros(5, len(blocks) + 1)
        return _factor(sums.index_add_(1, self.layout.of_blocks(blocks), self.moments)[:, :-1], self.total())

    def total(self) -> Tensor:
        """The factor of all gradients together."""
        moments = self.moments.sum(1)
        return _factor(moments, moments.new_ones(()))

    def zeroed(self) -> bool:
        """Whether nothing is left; asks the device."""
        return not bool(self.moments[1].any())


def _factor(moments: Tensor, otherwise: Tensor) -> Tensor:
    """The factor by which gradients were changed: norm by norm, times the cosine of the sampled entries.

    Example:
        >>> _factor(torch.tensor([[4.0], [1.0], [4.0], [1.0], [-2.0]]), torch.tensor(1.0))  # halved and turned round
        tensor([-0.5000])
    """
    before, after, *_ = moments
    ratio = (after / before).sqrt() * _cosine(moments)
    return torch.where(before > 0, ratio, otherwise)


def _cosine(moments: Tensor) -> Tensor:
    """Cosine of the sampled entries before and after; 1 where none is left, so that the norms alone count."""
    _, _, before, after, product = moments
    found = (product / (before.sqrt() * after.sqrt())).clamp(-1.0, 1.0)
    same = (product == before) & (product == after)  # exactly 1 then, which rounding would miss
    return torch.where((before > 0) & (after > 0) & ~same, found, 1.0)


class Clipping:
    """Compares the gradients at a step with those that the backward pass left; never waits for the device.

    Args:
        optimizer: The optimizer whose gradients are compared.

    Attributes:
        watching: Whether they are measured. Else only a touch shows, by which tensors they are and their versions.
            ``grad.data`` hides from that, so it will do only where nobody's code runs in between.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self.watching = optimizer, True
        self._layout: Layout | None = None
        self._seen: list[tuple[Tensor | None, int]] | None = None
        self._measured: tuple[Tensor, Tensor] | None = None
        self._counts: Tensor | None = None
        self._changes = 0

    @property
    def marked(self) -> bool:
        """Whether a backward pass is waiting for its step."""
        return self._seen is not None

    def mark(self) -> None:
        """Called when a backward pass is over."""
        self._seen = [(p.grad, -1 if p.grad is None else p.grad._version) for p in self._parameters()]
        self._measured = self._measure() if self.watching else None

    def forget(self) -> None:
        """Called when the step is taken, or will never be."""
        self._seen = self._measured = None

    def gone(self) -> bool:
        """Whether the gradients that were there have all been removed."""
        before = any(grad is not None for grad, _ in self._seen or ())
        return before and all(p.grad is None for p in self._parameters())

    def touched(self, among: set[nn.Parameter] | None = None) -> bool:
        """Whether others are there now, or the same ones have been changed in place; ``among`` these parameters."""
        pairs = zip(self._seen or (), self._parameters(), strict=False)
        return any(
            (among is None or p in among) and (p.grad is not grad or (grad is not None and grad._version != version))
            for (grad, version), p in pairs
        )

    def change(self, before: Tensor | float = 1.0, after: Tensor | float = 1.0) -> Change | None:
        """What happened since the last look, which this one is from now on; None where it was not measured.

        Args:
            before: What the gradients then are to be multiplied with to undo the scaling of the loss.
            after: What the present ones are to be multiplied with.
        """
        last, layout = self._measured, self._layout
        self.mark()
        if last is None or self._measured is None or layout is None or layout is not self._layout:
            return None
        (squares, entries), (squares_now, entries_now) = last, self._measured
        products = [
            (entries * before).square(),
            (entries_now * after).square(),
            entries * entries_now * (before * after),
        ]
        sampled = squares.new_zeros(3, len(squares)).index_add_(1, layout.owners, torch.stack(products))
        found = Change(torch.cat([torch.stack([squares * before**2, squares_now * after**2]), sampled]), layout)
        self._count(found)
        return found

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _measure(self) -> tuple[Tensor, Tensor] | None:
        """Squared norms [P] of the parts that this process holds, and sampled entries; None: no gradients."""
        parameters = self._parameters()
        if self._layout is None or len(self._layout.parameters) != len(parameters):
            self._layout = Layout(parameters)
        layout, grads = self._layout, [_plain(p.grad) for p in parameters]
        there = [grad for grad in grads if grad is not None]
        if not there:
            return None
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in there) else torch.float32
        half = any(grad.dtype in (torch.float16, torch.bfloat16) for grad in there)
        found = iter(torch._foreach_norm(there, 2, dtype=wide) if half else torch._foreach_norm(there, 2))
        norms = [layout.zeros[0] if grad is None else next(found).to(layout.device) for grad in grads]
        entries = [
            layout.zeros[:count] if grad is None else _ordered(grad, p)[::step][:count].to(layout.device)
            for grad, p, step, count in zip(grads, parameters, layout.steps, layout.counts, strict=True)
        ]
        return torch.stack(_alike(norms, wide)).square(), torch.cat(entries).to(wide)

    # -- what the report is told --------------------------------------------------------------------------------------

    def _count(self, change: Change) -> None:
        """Counts the changes that were more than one factor, and those that were more than one a parameter."""
        moments, total = change.moments, change.total()
        each, there = _factor(moments, total), moments[0] > 0
        uneven = (there & ((each - total).abs() > _UNEVEN * total.abs())).any()
        turned = (there & (moments[1] > 0) & (_cosine(moments).abs() < 1 - _TURNED)).any()
        counts = torch.stack([uneven, turned]).long()
        self._counts = counts if self._counts is None else self._counts + counts
        self._changes += 1

    def notes(self) -> list[str]:
        """Sentences for the report."""
        uneven, turned = (0, 0) if self._counts is None else self._counts.tolist()
        notes = []
        if uneven:
            notes.append(
                f"gradients were not clipped by one factor at {uneven} of {self._changes} looks before a step: each "
                "layer has its own factor, its weight and bias one together"
            )
        if turned:
            notes.append(
                f"gradients were changed by more than a factor for each parameter at {turned} of {self._changes} looks "
                "(clipping by value or by unit, noise, centralisation): a layer's mean factor stands for its elements"
            )
        return notes


def _plain(grad: Tensor | None) -> Tensor | None:
    """What can be measured of a gradient: this process's part; nothing of a sparse one."""
    if grad is None or grad.is_sparse:
        return None
    grad = local(grad.detach())
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _ordered(grad: Tensor, parameter: nn.Parameter) -> Tensor:
    """The elements in the order in which they lie in memory, so that nothing is copied (channels_last)."""
    strides = local(parameter.detach()).stride()
    order = sorted(range(grad.dim()), key=lambda d: -strides[d] if d < len(strides) else 0)
    return grad.permute(order).flatten()


def _alike(norms: list[Tensor], wide: torch.dtype) -> list[Tensor]:
    return norms if all(norm.dtype == wide for norm in norms) else [norm.to(wide) for norm in norms]
