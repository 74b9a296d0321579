"""Signals: inner products of every query's direction with each row's share of the step, taken in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.capture import Block, BlockTable, GradSample
from ine_callback.capture.hooks import FATAL, in_words
from ine_callback.capture.row_losses import Scale
from ine_callback.capture.verification import Verification
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.low_rank import MIXED, RANK, mixtures
from ine_callback.curvature.spectral import SpectralOperator, exponential
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import QueryError
from ine_callback.optimizers.rates import Schedule, rate_of, same_rate, step_rate
from ine_callback.queries import BoundQuery, gradients, scalar
from ine_callback.scoring.directions import Direction, Plan, SelfTerms, direction_of
from ine_callback.scoring.initial_noise import InitialNoise
from ine_callback.scoring.sign_contrasts import Contrasts, signed_by, summed
from ine_callback.utilities.isolation import isolated


@dataclass
class Signals:
    """Directions and the contraction of records with them.

    Args:
        module: The model.
        queries: The bound queries, the first columns.
        self_query: Whether a last column holds self-influence.
        optimizer: Its rates enter the discount.
        schedule: The learning rate that remains.
        curvature: Source of the discount, or None for the first-order signal (D = I).
        reservoir: A second source, averaged with the first: it sees across layers.
        noise: Sizes of the initial weights, for the units of signals.
        contrasts: Signs of the layers' units.
        processes: Those that train together: directions are made of what all of them saw.
        rank: Most dimensions of a layer's inputs that directions are held in; None: all.
        to_device: Moves a query batch to the module's device.
        context: Precision context for query evaluation.
        drop: Called with a module whose part of this failed, and why; it must come to :meth:`lose` with it.
    """

    module: nn.Module
    queries: Sequence[BoundQuery]
    self_query: bool
    optimizer: Optimizer
    schedule: Schedule
    curvature: KFAC | None
    reservoir: GradientSample
    noise: InitialNoise
    contrasts: Contrasts
    processes: Lockstep
    rank: int | None = RANK
    to_device: Callable[[Any], Any] = lambda batch: batch
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    drop: Callable[[nn.Module, str], None] = lambda module, why: None
    held: list[tuple[Block, GradSample, Scale]] | None = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = BlockTable(self.module, lambda a, b: same_rate(self.optimizer, a, b))
        self.columns = len(self.queries) + int(self.self_query)
        self._directions: dict[Block, Direction] = {}
        self._factors: dict[Block, Tensor] = {}
        self._signals: list[tuple[Block, Tensor]] = []
        self._own: list[tuple[Block, SelfTerms, Scale]] = []
        self.scale = Scale(1.0, 1.0)
        self._dtype = torch.promote_types(next(self.module.parameters()).dtype.to_real(), torch.float32)
        self.observing, self.resumed = 1, False  # steps that a look at the curvature stands for; 0: none now
        self.kept: Tensor | None = None
        self.proof: Verification | None = None
        self.aside = False
        self._draws = 0
        self._variance = torch.ones(len(self.queries))

    def check(self) -> None:
        """Evaluates every query on its first batch.

        Raises:
            QueryError: If a value cannot be computed, is no scalar or has no gradient.
        """
        with isolated(self.module), self.context():
            for query in self.queries:
                try:
                    value = query.value(self.module, self.to_device(query.batches[0][1]))
                except QueryError:
                    raise
                except Exception as error:
                    raise QueryError(
                        f"Query '{query.info.name}' cannot be computed on its first batch ({type(error).__name__}: "
                        f"{error}); its data must suit the step or function that computes it."
                    ) from error
                scalar(value, query)

    def start_batch(self, rows: int, device: torch.device, window: int) -> None:
        """Begins a batch of ``rows`` rows, of ``window`` rows in the whole step."""
        self.window, self._batch = window, (rows, device)
        self._clear()
        self._drawn = False
        self._first = True  # the backward pass meets the network's last layer first

    def receive(self, module: nn.Module, grad_samples: dict[str, GradSample], calls: int) -> None:
        """Takes the records of one module call, in the backward pass."""
        for block, grad_sample in self.table.sort(module, grad_samples):
            block.reused |= calls > 1 or block.tied
            if self.held is not None:  # which layer is the last stays as directions were made for it
                block.outputs |= self._first
            self.take(block, grad_sample)
        self._first = False

    def take(self, block: Block, grad_sample: GradSample) -> None:
        """Takes one record; before the first refresh it is held back until the backward pass is over."""
        if self.proof is not None:
            self.proof.take(block, grad_sample)
        if self.held is not None:
            self.held.append((block, grad_sample, self.scale))
            return
        if self.aside:  # the like of it was thrown away in the batch before
            return self._contract(block, grad_sample, self.scale)
        if self.curvature is not None and self.observing:
            self.curvature.observe(block, grad_sample, self.scale.terms, self.observing)
        self._keep(block, grad_sample, self.scale)
        self._contract(block, grad_sample, self.scale)

    def _keep(self, block: Block, grad_sample: GradSample, scale: Scale) -> None:
        if self.reservoir.full and not self.observing:
            return
        if not self._drawn:
            self.reservoir.draw(grad_sample.rows, scale.terms, self.window, self.observing)
            self._drawn = True
        self.reservoir.observe(block, grad_sample)

    def _contract(self, block: Block, grad_sample: GradSample, scale: Scale) -> None:
        direction = self._directions.get(block)
        if direction is None:  # a block first used after the last refresh: its signals start with the next one
            return
        signals, use = direction.contract(grad_sample)
        if signals is not None:
            self._signals.append((block, signals))
        if self.self_query and block.reused:
            block.waiting.append(use)
        elif self.self_query:
            self._own.append((block, direction.self_terms_of([use]), scale))

    def _clear(self) -> None:
        self._signals, self._own = [], []

    def lose(self, module: nn.Module) -> None:
        """Forgets the blocks of a module that was dropped; what they left in this batch may be half of it."""
        self._forget(set(self.table.drop_module(module)))

    def drop_block(self, block: Block) -> None:
        """Leaves a block out from now on, with what the present batch has of it."""
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
        self._own = [one for one in self._own if one[0] not in gone]
        if self.held is not None:
            self.held = [one for one in self.held if one[0] not in gone]

    @contextlib.contextmanager
    def _only(self, block: Block) -> Iterator[None]:
        """What fails inside costs the modules of this block, and no other."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, FATAL):
                for module in self.table.owners(block):
                    self.drop(module, in_words(error))
            if block in set(self.table):  # of the machine, or of a block that no layer's function made
                raise

    def discard_received(self) -> None:
        """Forgets what this batch's backward passes left so far: their gradients were thrown away."""
        self._clear()
        for block in self.table:
            block.waiting.clear()
        if self.held is not None:
            self.held = []
        if self.proof is not None:
            self.proof.forget()

    def hold(self) -> None:
        """Holds the coming records back, as in the first step: parameters have joined that have no direction yet."""
        self.held = []

    def release(self, unscale: Tensor | float) -> None:
        """Ends holding back: makes the first directions from all records held, then contracts those.

        The gradients in place are those of the records, times 1 / ``unscale``.
        """
        held, self.held = self.held or [], None
        if self.resumed:
            self.resumed = False
            self.reservoir.reopen([(block, grad_sample) for block, grad_sample, _ in held], self.processes)
            self.refresh(unscale)
            for block, grad_sample, self.scale in held:
                self.take(block, grad_sample)
            return
        if self.curvature is not None:
            for block, grad_sample, scale in held:
                with self._only(block):
                    self.curvature.observe(block, grad_sample, scale.terms, self.observing)
            held = [one for one in held if one[0] in set(self.table)]
        self.reservoir.open([(block, grad_sample) for block, grad_sample, _ in held], self.processes)
        for block, grad_sample, scale in held:
            self._keep(block, grad_sample, scale)
        self.reservoir.commit()
        self.refresh(unscale)
        for block, grad_sample, scale in held:
            with self._only(block):
                self._contract(block, grad_sample, scale)

    def settle(self, apart: bool) -> tuple[tuple[Block, ...], Tensor, Tensor]:
        """What a backward pass left: signals and contrasts [K, b, Q, 1 + J], each row's own squared unit [b].

        The unit of self-influence is that of the row's own loss.

        Args:
            apart: Whether the K blocks that come first are told apart; else their sum is all, and no block comes.
        """
        for block in [block for block in self.table if block.waiting]:
            with self._only(block):
                self._own.append((block, self._directions[block].self_terms_of(block.waiting), self.scale))
            block.waiting.clear()
        self.reservoir.commit()
        self._drawn = False
        found = [block for block, _ in self._signals] + [block for block, *_ in self._own]
        blocks = tuple(dict.fromkeys(found)) if apart else ()
        if self._signals:
            signals = _by_block(self._signals, blocks).to(self._dtype)
        else:
            (rows, device), shape = self._batch, (len(self.queries), 1 + self.contrasts.count)
            signals = torch.zeros(max(1, len(blocks)), rows, *shape, device=device, dtype=self._dtype)
        own, variance = self._self_sums(signals, blocks)
        self._clear()
        return blocks, (torch.cat([signals, own[:, :, None]], 2) if self.self_query else signals), variance

    def _self_sums(self, like: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
        """<P D g_i, s_i> with its contrasts [K, b, 1 + J] and |sigma D g_i|^2 [b].

        A row's own gradient is rows x its share. All blocks' parts are added up at once, by as many operations as one
        of them would need.
        """
        own, variance = like.new_zeros(like.shape[0], like.shape[1], like.shape[3]), like.new_zeros(like.shape[1])
        for scale in {id(its): its for *_, its in self._own}.values():  # a second backward pass may have its own
            found = [(block, one) for block, one, its in self._own if its is scale]
            norms = torch.stack([one.norms for _, one in found])  # [K, b, 2]
            shares = signed_by(torch.stack([one.energies for _, one in found]))
            factors = torch.stack([self._factors[block] for block, _ in found])
            weighted = norms * factors[:, None]
            parts = shares * weighted[..., :1]
            each = [(block, part) for (block, _), part in zip(found, parts.unbind(), strict=True)]
            own = own + (_by_block(each, blocks) if blocks else parts.sum(0, keepdim=True)) * scale.rows
            variance = variance + weighted[..., 1].sum(0) * scale.rows**2
        return own, variance

    def units(self, own: Tensor) -> Tensor:
        """Standard deviations [b, Q] that random initial weights leave in each query, from :meth:`settle`'s own."""
        columns = [self._variance.expand(len(own), -1), *([own[:, None]] if self.self_query else [])]
        variance = torch.cat(columns, 1)
        return torch.where(variance > 0, variance.sqrt(), 1.0)

    def refresh(self, unscale: Tensor | float = 1.0) -> None:
        """New directions ``U = P D v`` at the present weights, and their units ``|sigma D v|``."""
        v = self._gradients([block for block in self.table if all(p.requires_grad for p in block.parameters)])
        self._directions.clear()
        self._factors.clear()
        remaining = self.schedule.remaining(float(self.optimizer.param_groups[0]["lr"]))
        with torch.no_grad():
            if self.curvature is not None:
                self.curvature.pool(self.processes)
            plans: dict[Block, Plan] = {}
            for block in v:
                with self._only(block):
                    plans[block] = self._plan(block, remaining, unscale)
            v = {block: v[block] for block in plans}
            exponents = {block: plan.exponents for block, plan in plans.items()}
            mixed = self._mixtures(plans)
            across = self.reservoir.apply(v, exponents, self.processes) if self.queries else {}
            variance = torch.zeros(len(self.queries), device=next(self.module.parameters()).device)
            for block in list(plans):
                plan = plans.pop(block)  # with its gradient: both are as large as the block, and used up here
                factors = plan.weight, self.noise.of_weight(block)
                self._factors[block] = torch.stack(
                    [torch.as_tensor(x).to(variance.device, self._dtype) for x in factors]
                )
                u = None
                if self.queries:
                    u = plan.discount.apply(v.pop(block))
                    if block in across:
                        u = (u + across.pop(block)) / 2
                    variance += self.noise.variance(block, u)
                    u = u * plan.weight
                with self._only(block):
                    self._directions[block] = self._direction(block, u, plan, mixed[block])
            self._variance = variance.to(self._dtype)
        self.draw()

    def _mixtures(self, plans: dict[Block, Plan]) -> dict[Block, int | None]:
        """Mixtures of each block's sketch, by the share of self-influence that they meet; None: no self-influence."""
        if not self.self_query or self.rank is None:
            return dict.fromkeys(plans)
        found = {block: plan.discount.energies() for block, plan in plans.items()}
        parts = {block: part * plans[block].weight for block, part in found.items() if part is not None}
        table = torch.stack(list(parts.values())).cpu() if parts else torch.zeros(0, 2)
        total = max(float(table[:, 0].sum()), torch.finfo(table.dtype).tiny)
        needed = {block: mixtures(float(part[1]) / total) for block, part in zip(parts, table, strict=True)}
        return {block: needed.get(block, MIXED) for block in plans}

    def _direction(self, block: Block, u: Tensor | None, plan: Plan, mixed: int | None) -> Direction:
        direction, share = direction_of(block, self.contrasts, u, plan, self.rank, mixed)
        if share is not None:
            self.kept = share if self.kept is None else torch.minimum(self.kept, share)
        return direction

    def draw(self) -> None:
        """Draws new columns for the sketches of self-influence: errors of rows met at several steps average out."""
        self._draws += 1
        for direction in self._directions.values():
            direction.draw(self._draws)

    def _gradients(self, blocks: Sequence[Block]) -> dict[Block, Tensor]:
        """Gradients v [Q, *layout] of the queries, for the blocks that every process has."""
        parameters = [p for block in blocks for p in block.parameters]
        self.processes.exchange()  # the passes of a model split by FSDP2 are collectives
        with isolated(self.module), self.context():
            found = iter(gradients(self.queries, self.module, parameters, self.to_device))
        with torch.no_grad():
            v = {b: b.to_layout([next(found) for _ in b.parameters]) for b in blocks}
        names = self.processes.common(block.key for block in blocks)
        shared = {block: v[block] for block in sorted(blocks, key=lambda block: block.key) if block.key in names}
        self.processes.average(shared.values())
        return shared

    def state_dict(self, together: bool) -> dict[str, Any]:
        """What directions are made of; they themselves are too large to keep, and are made anew.

        Args:
            together: Whether all processes are here, right after a meeting; else this one's part must do.
        """
        curvature = {}
        if self.curvature is not None:
            if together:
                self.curvature.pool(self.processes)
            curvature = self.curvature.state_dict()
        reservoir = self.reservoir.state_dict(self.processes if together else None)
        parts = {"draws": self._draws, "noise": self.noise.state_dict(), "schedule": self.schedule.state_dict()}
        return {"curvature": curvature, "reservoir": reservoir, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, before the first batch."""
        if self.curvature is not None:
            self.curvature.load_state_dict(state["curvature"], next(self.module.parameters()).device)
        self.reservoir.load_state_dict(state["reservoir"])
        self.noise.load_state_dict(state["noise"])
        self.schedule.load_state_dict(state["schedule"])
        self._draws = state["draws"]
        self.resumed = True

    def forget(self) -> None:
        """Frees the directions: no more records will come."""
        self._directions.clear()
        self._clear()

    def notes(self) -> list[str]:
        """Sentences for the report about what was left out."""
        return [note for note in (self.reservoir.note, self.noise.note) if note]

    def _plan(self, block: Block, remaining: float, unscale: Tensor | float) -> Plan:
        """A block's discount and weight; parameter groups with their own learning rates count relative to the first."""
        rate, step = rate_of(self.optimizer, block.parameters, unscale), step_rate(self.optimizer)
        lr = float(self.optimizer.param_groups[0]["lr"])
        weight = rate.weight * (rate.step / step if step else 1.0)
        ahead = remaining * (rate.lr / lr if lr else 1.0)
        exponents = ahead * rate.curvature, ahead * rate.decay
        discount = (
            SpectralOperator() if self.curvature is None else self.curvature.operator(block, exponential(*exponents))
        )
        return Plan(discount, weight, exponents)


def _by_block(found: Sequence[tuple[Block, Tensor]], blocks: tuple[Block, ...]) -> Tensor:
    """Sums of each block's tensors [K, ...]; of all [1, ...], where there are no blocks to tell apart."""
    if not blocks:
        return summed([part for _, part in found])[None]
    parts: dict[Block, list[Tensor]] = {block: [] for block in blocks}
    for block, part in found:
        parts[block].append(part)
    return torch.stack([summed(each) if each else torch.zeros_like(found[0][1]) for each in parts.values()])
