"""Signals: inner products of queries' directions with each row's gradient contribution, during the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture import Block, GradSample
from ine_callback.capture.row_losses import Scale
from ine_callback.capture.verification import Verification
from ine_callback.curvature.sketch import HALVES
from ine_callback.scoring.directions import SelfTerms
from ine_callback.scoring.refresh import Directions
from ine_callback.scoring.sign_contrasts import signed_by, summed

HOST = torch.device("cpu")  # where gradients wait that are held back

Held = tuple[Block, GradSample, Scale]


@dataclass
class Signals(Directions):
    """Contracts per-sample gradients with the directions; arguments as for :class:`.Directions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._signals: list[tuple[Block, Tensor]] = []
        self._self_terms: list[tuple[Block, SelfTerms, Scale]] = []
        self.scale = Scale(1.0, 1.0)
        self.held: list[Held] = []  # while there are no directions
        self.curvature_steps = 1  # how many steps a curvature update stands for; 0: none now
        self._restored = False  # whether a checkpoint's curvature waits for its first directions
        self.verification: Verification | None = None
        self.aside = False
        self.borrowed = False  # whether gradients must be copied to outlive the call that brings them
        self.unused: set[Block] = set()  # whose gradients of this pass no step is expected to take

    def start_batch(self, rows: int, device: torch.device, window: int) -> None:
        """Begins a batch of ``rows`` rows; the whole optimizer step has ``window`` rows."""
        self.window, self._batch = window, (rows, device)
        self._clear()
        self._selected = False
        self._first = True  # the backward pass begins with the network's last layer

    def nothing(self, device: torch.device) -> Tensor:
        """The signals of no rows [0, Q, width]."""
        return torch.zeros(0, self.columns, self.width, device=device, dtype=self._dtype)

    def receive(
        self, module: nn.Module, grad_samples: dict[str, GradSample], calls: int, hold: bool, layer: bool = True
    ) -> None:
        """Takes the per-sample gradients of one module call, in the backward pass.

        Args:
            module: The module.
            grad_samples: By the parameters' names.
            calls: How often it was called in this batch.
            hold: As for :meth:`take`.
            layer: Whether it can be the network's last layer; else it is a scale or a shift of what that gives.
        """
        for block, grad_sample in self.table.sort(module, grad_samples):
            block.reused |= calls > 1 or block.tied
            if hold:  # later, the last layer stays the one that directions were made for
                block.outputs |= self._first and layer
            self.take(block, grad_sample, hold)
        self._first &= not layer

    def take(self, block: Block, grad_sample: GradSample, hold: bool) -> None:
        """Takes one block's per-sample gradients, or holds them back until :meth:`release` makes directions."""
        if self.verification is not None:
            self.verification.take(block, grad_sample)
        if hold or (self.several and block not in self._directions):
            # on the device those of all layers together would be as much as a step's activations
            waits = grad_sample.copied() if self.borrowed and self._batch[1] == HOST else grad_sample.moved(HOST)
            self.held.append((block, waits, self.scale))
            return
        if self.aside or block in self.unused:  # such gradients were discarded in the batch before: no curvature
            return self._contract(block, grad_sample, self.scale)
        if self.curvature is not None and self.curvature_steps:
            self.curvature.observe(block, grad_sample, self.scale.terms, self.curvature_steps)
        self._sample(block, grad_sample, self.scale)
        self._contract(block, grad_sample, self.scale)

    def _sample(self, block: Block, grad_sample: GradSample, scale: Scale) -> None:
        if self.reservoir.full and not self.curvature_steps:
            return
        if not self._selected:
            self.reservoir.select(grad_sample.rows, scale.terms, self.window, self.curvature_steps)
            self._selected = True
        self.reservoir.observe(block, grad_sample)

    def _contract(self, block: Block, grad_sample: GradSample, scale: Scale) -> None:
        if self.compression is not None:
            self.compression.run(self.compression.take, block, grad_sample)
        direction = self._directions.get(block)
        if direction is None:  # a block first used after the last refresh: its signals start with the next one
            return
        if self.several:
            self._trained.add(block)
        signals, use = direction.contract(grad_sample)
        if signals is not None:
            self._signals.append((block, signals))
        if self.self_query and block.reused:
            block.waiting.append(use.copied() if self.borrowed and isinstance(use, GradSample) else use)
        elif self.self_query:
            self._self_terms.append((block, direction.self_terms_of([use]), scale))

    def unmake(self, blocks: Sequence[Block]) -> None:
        """Forgets directions, so that the next gradients of these blocks are held back until there are new ones."""
        for block in blocks:
            self._directions.pop(block, None)

    def _clear(self) -> None:
        self._signals, self._self_terms = [], []
        if self.compression is not None:
            self.compression.clear()

    def lose(self, lost: nn.Module | nn.Parameter) -> None:
        """Forgets the blocks of a dropped module or bare parameter, with their part of the batch, maybe incomplete."""
        self._forget(set(self.table.drop_all(lost)))

    def follow(self, module: nn.Module) -> None:
        """Takes a module's parameters by the names that they have now; their blocks are made anew."""
        self._forget(set(self.table.follow(module, self.module)))

    def drop_block(self, block: Block) -> None:
        """Leaves a block out from now on, and out of the present batch."""
        self.table.drop(block)
        self._forget({block})

    def _forget(self, gone: set[Block]) -> None:
        for block in gone:
            self._directions.pop(block, None)
            self._factors.pop(block, None)
            self.reservoir.forget(block)
            if self.curvature is not None:
                self.curvature.forget(block)
        self._signals = [one for one in self._signals if one[0] not in gone]
        self._self_terms = [one for one in self._self_terms if one[0] not in gone]
        self.held = [one for one in self.held if one[0] not in gone]

    def discard_received(self) -> None:
        """Forgets what this batch's backward passes left so far, since their gradients were discarded."""
        self._clear()
        for block in self.table:
            block.waiting.clear()
        self.held.clear()
        if self.verification is not None:
            self.verification.forget()

    def release(self, unscale: Tensor | float) -> None:
        """Makes the first directions from everything held back, then contracts that.

        Args:
            unscale: Factor that undoes the scaling of the present gradients under mixed precision.
        """
        held, self.held = self.held, []
        back = partial(_moved, held, self._batch[1])  # one at a time
        if self._restored:
            self._restored = False
            others = list(self.table) if self.several else []
            self.reservoir.reopen(((block, grad_sample) for block, grad_sample, _ in back()), self.processes, others)
            self.refresh(unscale)
            for block, grad_sample, self.scale in back():
                self.take(block, grad_sample, hold=False)
            return
        if self.curvature is not None:
            for block, grad_sample, scale in back():
                with self._only(block):  # what joins between two curvature updates has no other one yet
                    self.curvature.observe(block, grad_sample, scale.terms, max(1, self.curvature_steps))
            held[:] = [one for one in held if one[0] in set(self.table)]
        self.reservoir.open(((block, one) for block, one, _ in back()), self.processes, self.several)
        for block, grad_sample, scale in back():
            self._sample(block, grad_sample, scale)
        self.reservoir.commit()
        self.refresh(unscale)
        for block, grad_sample, scale in back():
            with self._only(block):
                self._contract(block, grad_sample, scale)

    def settle(self, apart: bool) -> tuple[tuple[Block, ...], Tensor, Tensor]:
        """What a backward pass left: K blocks, signals [K, b, Q, width], self-influence's variance.

        Each signal is followed by its contrasts, see :attr:`.Directions.width`. The variance [1, b] is the squared unit
        of the loss on the row itself; with several optimizers each block's part of it [K, b], for not all may step.

        Args:
            apart: Whether to return signals for each block; else their sum, with K = 1 and no blocks.
        """
        for block in [block for block in self.table if block.waiting]:
            with self._only(block):
                self._self_terms.append((block, self._directions[block].self_terms_of(block.waiting), self.scale))
            block.waiting.clear()
        self.reservoir.commit()
        self._selected = False
        found = [block for block, _ in self._signals] + [block for block, *_ in self._self_terms]
        blocks = tuple(dict.fromkeys(found)) if apart else ()
        if self._signals:
            signals = _by_block(self._signals, blocks).to(self._dtype)
        else:
            (rows, device), shape = self._batch, (len(self.queries), 1 + self.contrasts.count)
            signals = torch.zeros(max(1, len(blocks)), rows, *shape, device=device, dtype=self._dtype)
        if not self.self_query:
            self._clear()
            return blocks, signals, signals.new_zeros(self._variances(blocks), signals.shape[1])
        own, halves, variance = self._self_sums(signals, blocks)
        self._clear()
        own = torch.cat([own, halves], -1)
        signals = torch.nn.functional.pad(signals, (0, halves.shape[-1]))  # queries have no sketch
        return blocks, torch.cat([signals, own[:, :, None]], 2), variance

    def _variances(self, blocks: tuple[Block, ...]) -> int:
        """For how many parts of the network self-influence's variance is told apart."""
        return len(blocks) if self.several and blocks else 1

    def _self_sums(self, like: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """<P D g_i, s_i> with its contrasts [K, b, 1 + J], halves [K, b, 2] and |sigma D g_i|^2 [1 or K, b].

        A row's gradient g_i is its contribution s_i times the number of rows. All blocks are summed at once, by as many
        operations as one of them needs.
        """
        total = like.new_zeros(like.shape[0], like.shape[1], like.shape[3])
        variance = like.new_zeros(self._variances(blocks), like.shape[1])
        halves, unit_halves = (like.new_zeros(*total.shape[:2], HALVES) for _ in range(2))
        # a second backward pass may have another scale
        for scale in {id(its): its for *_, its in self._self_terms}.values():
            found = [(block, one) for block, one, its in self._self_terms if its is scale]
            owners = [block for block, _ in found]
            norms = torch.stack([one.norms for _, one in found])  # [n, b, 2]
            signed = signed_by(torch.stack([one.unit_energies for _, one in found]))
            weighted = norms * torch.stack([self._factors[block] for block in owners])[:, None]
            total = total + _each(signed * weighted[..., :1], owners, blocks) * scale.rows
            variance = variance + _each(weighted[..., 1], owners, blocks if len(variance) > 1 else ()) * scale.rows**2
            sketches = [(block, one.halves) for block, one in found if one.halves is not None]
            if sketches:
                owners, of_sketch = [block for block, _ in sketches], torch.stack([each for _, each in sketches])
                of_sketch = of_sketch * torch.stack([self._factors[block] for block in owners])[:, None, None]
                of_signal, of_variance = _each(of_sketch, owners, blocks).unbind(-1)
                halves = halves + of_signal * scale.rows
                unit_halves = unit_halves + of_variance * scale.rows**2
        # as the signals are in units: to first order the error of c / sqrt(v) is that of c - (c / 2 v) v, over sqrt(v)
        c, v = total[..., 0].sum(0), variance.sum(0)
        return total, halves - torch.where(v > 0, c / (2 * v), 0.0)[:, None] * unit_halves, variance

    def units(self, self_variance: Tensor) -> Tensor:
        """Standard deviations [b, Q] that random initial weights leave in each query.

        Args:
            self_variance: Self-influence's variance [b] from :meth:`settle`.
        """
        columns = [self._variance.expand(len(self_variance), -1), self_variance[:, None]]
        variance = torch.cat(columns if self.self_query else columns[:1], 1)
        return torch.where(variance > 0, variance.sqrt(), 1.0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, before the first batch."""
        super().load_state_dict(state)
        self._restored = True

    def forget(self) -> None:
        """Frees the directions: no more per-sample gradients will come."""
        self._directions.clear()
        self._clear()


def _moved(held: Sequence[Held], device: torch.device) -> Iterator[Held]:
    """What was held back, on the device again."""
    return ((block, grad_sample.moved(device), scale) for block, grad_sample, scale in held)


def _each(parts: Tensor, owners: Sequence[Block], blocks: tuple[Block, ...]) -> Tensor:
    """Sums of each block's parts of [n, ...], as of :func:`_by_block`; all at once where there is one sum."""
    if not blocks:
        return parts.sum(0, keepdim=True)
    return _by_block(list(zip(owners, parts.unbind(), strict=True)), blocks)


def _by_block(found: Sequence[tuple[Block, Tensor]], blocks: tuple[Block, ...]) -> Tensor:
    """Sums of each block's tensors [K, ...]; without blocks the sum of all [1, ...]."""
    if not blocks:
        return summed([part for _, part in found])[None]
    parts: dict[Block, list[Tensor]] = {block: [] for block in blocks}
    for block, part in found:
        parts[block].append(part)
    none = torch.zeros_like(found[0][1]) if not all(parts.values()) else found[0][1]
    return torch.stack([summed(each) if each else none for each in parts.values()])
