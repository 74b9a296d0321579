"""How gradients change between the backward pass and the optimizer's step, above all by clipping, whoever does it.

A row's contribution to a step is its part of what is in ``.grad`` when the step is taken. So gradients are measured
when a backward pass is over, and again before the optimizer (or a further backward pass) uses them. The change is taken
as one factor for each block, by norm and direction. That is exact where all gradients of a block were scaled alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.capture import Block
from ine_callback.distributed.sharding import local
from ine_callback.utilities.fused import Fused

MAX_ENTRIES = 1024  # entries of each gradient that are sampled, to compare its direction
FACTOR_TOLERANCE, COSINE_TOLERANCE = 1e-2, 1e-4  # gradients may be in half precision


@dataclass(frozen=True)
class Place:
    """Which entries of a gradient are sampled: every ``step``-th in memory, ``count`` in all.

    Attributes:
        step: The distance; odd, so that no column of a matrix is taken alone.
        count: How many.
        strides: The parameter's, where it has no holes in memory; else None.
        order: Its dimensions, as they lie in memory.
    """

    step: int
    count: int
    strides: tuple[int, ...] | None
    order: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Place:
        """That of a parameter's gradient."""
        size, strides = parameter.numel(), parameter.stride()
        step = (size // MAX_ENTRIES) | 1
        extent = 1 + sum((length - 1) * stride for length, stride in zip(parameter.shape, strides, strict=True))
        order = tuple(sorted(range(parameter.dim()), key=lambda d: -strides[d]))
        return cls(step, min(MAX_ENTRIES, -(-size // step)), strides if extent == size else None, order)

    def sample(self, grad: Tensor) -> Tensor:
        """The entries, in the order in which they lie in memory, so that nothing is copied (channels_last)."""
        if grad.stride() == self.strides:
            return grad.as_strided((self.count,), (self.step,))
        ordered = grad.permute(self.order) if grad.dim() == len(self.order) else grad  # complex: two numbers each
        return ordered.flatten()[:: self.step][: self.count]


class Layout:
    """Which entries of the parameters are sampled. Index tensors are made once: sending them waits for the device.

    Args:
        parameters: Those of the optimizer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.device = parameters, parameters[0].device
        self.places = [Place.of(local(p.detach())) for p in parameters]
        self.zeros = torch.zeros(MAX_ENTRIES, device=self.device)
        counts = torch.tensor([place.count for place in self.places])
        self.parameter_of = torch.arange(len(parameters)).repeat_interleave(counts).to(self.device)
        self._index = {p: k for k, p in enumerate(parameters)}
        self._blocks: dict[tuple[Block, ...], Tensor] = {}

    def of_blocks(self, blocks: tuple[Block, ...]) -> Tensor:
        """Index [P] of each parameter's block; len(blocks) for parameters in none."""
        if blocks not in self._blocks:
            index = torch.full((len(self.parameters),), len(blocks))
            for k, block in enumerate(blocks):
                for p in block.parameters:
                    if p in self._index:
                        index[self._index[p]] = k
            self._blocks = {blocks: index.to(self.device)}
        return self._blocks[blocks]


@dataclass
class Change:
    """What was done to the gradients of P parameters, as sums over their elements.

    Attributes:
        moments: Squared norms before and after; squares of the sampled entries before and after, and their products
            [5, P].
        layout: Which parameters.
    """

    moments: Tensor
    layout: Layout

    def factors(self, blocks: tuple[Block, ...]) -> Tensor:
        """One factor for each block [K]; that of all gradients together where a block had no gradient before."""
        return _by_block(self.moments, self.layout.of_blocks(blocks), len(blocks))

    def total(self) -> Tensor:
        """The factor of all gradients together."""
        sums = self.moments.sum(1)
        return _or_one(sums, _factor(sums, _cosine(sums)))

    def zeroed(self) -> bool:
        """Whether all gradients are zero now; synchronises with the device."""
        return not bool(self.moments[1].any())


@Fused
def _moments(
    squares: Tensor,
    entries: Tensor,
    squares_now: Tensor,
    entries_now: Tensor,
    parameter_of: Tensor,
    before: Tensor | float,
    after: Tensor | float,
) -> Tensor:
    """The sums of :class:`Change`, of two measurements; see :meth:`Clipping.change`."""
    products = [(entries * before).square(), (entries_now * after).square(), entries * entries_now * (before * after)]
    sampled = squares.new_zeros(3, squares.shape[0]).index_add(1, parameter_of, torch.stack(products))
    return torch.cat([torch.stack([squares * before**2, squares_now * after**2]), sampled])


@Fused
def _by_block(moments: Tensor, place: Tensor, blocks: int) -> Tensor:
    """Factors of ``blocks`` blocks, of moments of parameters that are in the block of this place, or in none."""
    sums = moments.new_zeros(5, blocks + 1).index_add(1, place, moments)[:, :-1]
    factors, whole, _ = _with_total(sums, moments)
    return torch.where(sums[0] > 0, factors, whole)


@Fused
def _uneven(moments: Tensor) -> Tensor:
    """Whether parameters were changed by several factors, and whether one by more than a factor [2]."""
    factors, whole, cosine = _with_total(moments, moments)
    present = moments[0] > 0
    uneven = present & ((factors - whole).abs() > FACTOR_TOLERANCE * whole.abs())
    rotated = present & (moments[1] > 0) & (cosine.abs() < 1 - COSINE_TOLERANCE)
    return torch.stack([uneven.any(), rotated.any()]).long()


def _with_total(sums: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of sums [n], that of all parameters together [1], and cosines of sums [n]; all in one go."""
    every = torch.cat([sums, moments.sum(1, keepdim=True)], 1)
    cosine = _cosine(every)
    factors = _factor(every, cosine)
    return factors[:-1], _or_one(every[:, -1:], factors[-1:]), cosine[:-1]


def _factor(sums: Tensor, cosine: Tensor) -> Tensor:
    """The factor by which gradients were changed: the ratio of norms times the cosine of the sampled entries.

    Example:
        >>> halved_and_reversed = torch.tensor([[4.0], [1.0], [4.0], [1.0], [-2.0]])
        >>> _factor(halved_and_reversed, _cosine(halved_and_reversed))
        tensor([-0.5000])
    """
    return (sums[1] / sums[0]).sqrt() * cosine


def _or_one(sums: Tensor, factors: Tensor) -> Tensor:
    """The factors, and 1 where there was no gradient before."""
    return torch.where(sums[0] > 0, factors, 1.0)


def _cosine(sums: Tensor) -> Tensor:
    """Cosine of the sampled entries before and after; 1 where they are zero, so that the norms alone count."""
    _, _, before, after, product = sums
    cosine = (product / (before.sqrt() * after.sqrt())).clamp(-1.0, 1.0)
    same = (product == before) & (product == after)  # then exactly 1, without rounding
    return torch.where((before > 0) & (after > 0) & ~same, cosine, 1.0)


class Clipping:
    """Compares the gradients at a step with those after the backward pass; never synchronises with the device.

    Args:
        optimizer: The optimizer whose gradients are compared.

    Attributes:
        watching: Whether gradients are measured. Else only :meth:`touched` tells of changes, by the identity and the
            version of the tensors. It misses changes through ``grad.data``, so it is enough only where no user code
            runs in between.
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
        """Called when the step was taken, or will never be."""
        self._seen = self._measured = None

    def gone(self) -> bool:
        """Whether all gradients of the backward pass have been removed."""
        before = any(grad is not None for grad, _ in self._seen or ())
        return before and all(p.grad is None for p in self._parameters())

    def touched(self, among: set[nn.Parameter] | None = None) -> bool:
        """Whether gradients were replaced or changed in place.

        Args:
            among: Only the gradients of these parameters count; None: of all.
        """
        pairs = zip(self._seen or (), self._parameters(), strict=False)
        return any(
            (among is None or p in among) and (p.grad is not grad or (grad is not None and grad._version != version))
            for (grad, version), p in pairs
        )

    def change(self, before: Tensor | float = 1.0, after: Tensor | float = 1.0) -> Change | None:
        """The change since the last measurement, and a new measurement; None if the gradients were not measured.

        Args:
            before: Factor that undoes the scaling of the loss in the gradients of the last measurement.
            after: The same for the present gradients.
        """
        last, layout = self._measured, self._layout
        self.mark()
        if last is None or self._measured is None or layout is None or layout is not self._layout:
            return None
        found = Change(_moments(*last, *self._measured, layout.parameter_of, before, after), layout)
        counts = _uneven(found.moments)
        self._counts = counts if self._counts is None else self._counts + counts
        self._changes += 1
        return found

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _measure(self) -> tuple[Tensor, Tensor] | None:
        """Squared norms [P] of the parts that this process holds, and sampled entries; None without gradients."""
        parameters = self._parameters()
        if self._layout is None or len(self._layout.parameters) != len(parameters):
            self._layout = Layout(parameters)
        layout, grads = self._layout, [_plain(p.grad) for p in parameters]
        present = [grad for grad in grads if grad is not None]
        if not present:
            return None
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in present) else torch.float32
        half = any(grad.dtype in (torch.float16, torch.bfloat16) for grad in present)
        found = iter(torch._foreach_norm(present, 2, dtype=wide) if half else torch._foreach_norm(present, 2))
        nothing, device = layout.zeros[0], layout.device
        norms = [nothing if grad is None else next(found) for grad in grads]
        entries = [
            layout.zeros[: place.count] if grad is None else place.sample(grad)
            for grad, place in zip(grads, layout.places, strict=True)
        ]
        norms, entries = (_cast(each, wide, device) for each in (norms, entries))
        return torch.stack(norms).square(), torch.cat(entries)

    # -- for the report ------------------------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Sentences for the report."""
        uneven, rotated = (0, 0) if self._counts is None else self._counts.tolist()
        notes = []
        if uneven:
            notes.append(
                f"gradients were not clipped by one factor at {uneven} of {self._changes} steps and passes: each layer "
                "has its own factor, its weight and bias one together"
            )
        if rotated:
            notes.append(
                f"gradients were changed by more than a factor for each parameter at {rotated} of {self._changes} "
                "steps and passes (clipping by value or by unit, noise, centralisation): a layer's mean factor stands "
                "for its elements"
            )
        return notes


def _plain(grad: Tensor | None) -> Tensor | None:
    """The part of a gradient that is measured: this process's; None for a sparse gradient."""
    if grad is None or grad.is_sparse:
        return None
    if type(grad) is not Tensor or grad.requires_grad:  # sharded, or made with create_graph
        grad = local(grad.detach())
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _cast(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [t if t.dtype == dtype and t.device == device else t.to(device, dtype) for t in tensors]
