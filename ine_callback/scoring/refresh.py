"""Refreshes: directions ``U = P D v`` of every query and block, made anew at intervals from the present weights.

v is a query's gradient, D the discount and P the factor of a gradient contribution in a step of the optimizer. The
discount ``exp(-R F)`` is what the rest of training leaves of a change made now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture import Block, BlockTable
from ine_callback.capture.errors import FATAL, in_words
from ine_callback.curvature.gradient_sample import Exponents, GradientSample, Removed
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.low_rank import RANK
from ine_callback.curvature.sketch import HALVES, MIN_MIXTURES, mixtures
from ine_callback.curvature.spectral import SpectralOperator, exponential
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import QueryError
from ine_callback.optimizers.joint import AnyOptimizer, JointOptimizer
from ine_callback.optimizers.registry import own_step_rate, rate_of, remaining_lr, same_rate
from ine_callback.optimizers.schedule import Schedule
from ine_callback.queries import BoundQuery, gradients, scalar
from ine_callback.scoring.compression import Compression
from ine_callback.scoring.directions import ChunkedDirection, Direction, DirectionSpec, direction_of
from ine_callback.scoring.initial_noise import InitialNoise
from ine_callback.scoring.sign_contrasts import Contrasts
from ine_callback.utilities.isolation import isolated

WHOLE_BYTES = 2**32  # gradients of all queries that take more are not held at once
CHUNK_BYTES = 2**30  # but so many of them (one query's at least); meanwhile their directions are held, too


@dataclass
class _Shared:
    """What the directions of all queries are made of."""

    specs: dict[Block, DirectionSpec]
    mixtures: dict[Block, int | None]
    exponents: Exponents
    removed: Removed | None


@dataclass
class Directions:
    """The directions of all blocks, and what they are made of.

    Args:
        module: The model.
        queries: The bound queries, the first columns.
        self_query: Whether a last column holds self-influence.
        optimizer: Its rates enter the discount.
        schedule: The learning rate that remains.
        curvature: Source of the discount; None for the first-order signal (D = I).
        reservoir: A sample of gradients, a second source of the discount, averaged with the first: it sees across
            layers.
        noise: Sizes of the initial weights, for the units of signals.
        contrasts: Signs of the layers' units.
        processes: Those that train together: directions are made of what all of them saw.
        rank: Most dimensions of a layer's inputs that a query's direction is held in; None: all.
        to_device: Moves a query batch to the module's device.
        context: Precision context for query evaluation.
        drop: Called with a module whose part of this failed, and the reason; it must call :meth:`.Signals.lose` with
            that module.
        compression: Compresses contributions for a gradient store; None without one.

    Attributes:
        table: The blocks.
        width: Numbers that belong to a signal: itself, its contrasts, and with self-influence the differences between
            halves of sketches (:mod:`.sketch`).
        retained_variance: Smallest fraction of a block's signal variance that a low-rank direction retained; None
            without one.
        chunked: Whether the queries' gradients were too large together, so that some came after the other, each in a
            basis of low rank.
    """

    module: nn.Module
    queries: Sequence[BoundQuery]
    self_query: bool
    optimizer: AnyOptimizer
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
    compression: Compression | None = None

    def __post_init__(self) -> None:
        self.table = BlockTable(self.module, lambda a, b: same_rate(self.optimizer, a, b))
        self.columns = len(self.queries) + int(self.self_query)
        self.width = 1 + self.contrasts.count + HALVES * self.self_query
        self.retained_variance: Tensor | None = None
        self.chunked = False
        self._directions: dict[Block, Direction] = {}
        self._factors: dict[Block, Tensor] = {}  # of self-influence: the step's, and the initial weights' variance
        self._dtype = torch.promote_types(next(self.module.parameters()).dtype.to_real(), torch.float32)
        self._draws = 0
        self.several = isinstance(self.optimizer, JointOptimizer)
        self._outputs: set[str] = set()  # of the run before, where this one took no step
        self._trained: set[Block] = set()  # since the last refresh, though another optimizer's turn may freeze them now
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

    def refresh(self, unscale: Tensor | float = 1.0) -> None:
        """Makes new directions ``U = P D v`` at the present weights, and their units ``|sigma D v|``.

        Args:
            unscale: Factor that undoes the scaling of the present gradients under mixed precision.
        """
        trained = [b for b in self.table if b in self._trained or all(p.requires_grad for p in b.parameters)]
        self._trained.clear()
        self._directions.clear()
        self._factors.clear()
        chunks = self._chunks()
        self.chunked = len(chunks) > 1
        shared: _Shared | None = None
        parts: dict[Block, list[Direction]] = {}
        variances = []
        for queries in chunks:
            v = self._gradients(trained, queries)
            with torch.no_grad():
                shared = self._shared(list(v), unscale) if shared is None else shared
                variances.append(self._take(v, shared, parts, len(queries), queries is chunks[-1]))
        known = set(self.table)
        self._directions.update({block: ChunkedDirection.of(each) for block, each in parts.items() if block in known})
        self._variance = torch.cat(variances).to(self._dtype)
        self.draw()

    def _chunks(self) -> list[Sequence[BoundQuery]]:
        """The queries whose gradients are made at once: all of them, where these take at most :data:`WHOLE_BYTES`.

        Else each chunk's directions are of low rank (:data:`.FORCED_RANK` dimensions a query at most), whatever these
        retain: whole ones would take as much as that many models.
        """
        one = 4 * sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        whole = one * len(self.queries) <= WHOLE_BYTES
        size = max(1, len(self.queries)) if whole else max(1, CHUNK_BYTES // one)
        return [self.queries[start : start + size] for start in range(0, max(1, len(self.queries)), size)]

    def _shared(self, blocks: Sequence[Block], unscale: Tensor | float) -> _Shared:
        """What the directions of all queries have in common."""
        if self.curvature is not None:
            self.curvature.pool(self.processes)
        specs = self._specs(blocks, unscale)
        exponents = {block: spec.exponents for block, spec in specs.items()}
        needed = bool(self.queries) or self.compression is not None
        removed = self.reservoir.removed(exponents, self.processes) if needed else None
        if self.compression is not None and self.curvature is not None:
            self.compression.run(self.compression.refresh, specs, self.curvature, removed, self.schedule.steps)
        return _Shared(specs, self._mixtures(specs), exponents, removed)

    def _take(
        self, v: dict[Block, Tensor], shared: _Shared, parts: dict[Block, list[Direction]], count: int, last: bool
    ) -> Tensor:
        """Adds the directions of ``count`` queries with gradients v to ``parts``; returns their variances."""
        specs, device = shared.specs, next(self.module.parameters()).device
        across = {} if shared.removed is None else shared.removed.apply(v, shared.exponents)
        variance = torch.zeros(count, device=device)
        for block in list(specs):
            spec = specs.pop(block)  # freed here after the last, like its gradient: both are as large as the block
            factors = [torch.as_tensor(x) for x in (spec.weight, self.noise.of_weight(block))]
            self._factors[block] = torch.stack([x.to(device, self._dtype) for x in factors])
            u = None
            if count:
                u = spec.discount.apply(v.pop(block))
                if block in across:
                    u = (u + across.pop(block)) / 2
                variance += self.noise.variance(block, u)
                u = u * spec.weight
            with self._only(block):
                mixtures = None if block in parts else shared.mixtures[block]
                parts.setdefault(block, []).append(self._direction(block, u, spec, mixtures))
                if not last:
                    specs[block] = spec
        return variance

    @property
    def outputs(self) -> set[str]:
        """Keys of the blocks whose units are the network's outputs."""
        return {block.key for block in self.table if block.outputs} or self._outputs

    def _specs(self, blocks: Sequence[Block], unscale: Tensor | float) -> dict[Block, DirectionSpec]:
        """What the blocks' directions are made of, without the blocks where that failed."""
        remaining = self.schedule.remaining(float(self.optimizer.param_groups[0]["lr"]))
        specs = {}
        with contextlib.nullcontext() if self.curvature is None else self.curvature.decomposed(blocks):
            for block in blocks:
                with self._only(block):
                    specs[block] = self._spec(block, remaining, unscale)
        return specs

    def _spec(self, block: Block, remaining: float, unscale: Tensor | float) -> DirectionSpec:
        """What one block's direction is made of; rates count relative to its optimizer's first parameter group."""
        first = block.parameters[0]
        rate, step = rate_of(self.optimizer, block.parameters, unscale), own_step_rate(self.optimizer, first)
        weight = rate.weight * (rate.step / step if step else 1.0)
        ahead = remaining_lr(self.optimizer, remaining, first, rate.lr)
        exponents = ahead * rate.curvature, ahead * rate.decay
        discount = (
            SpectralOperator() if self.curvature is None else self.curvature.operator(block, exponential(*exponents))
        )
        return DirectionSpec(discount, weight, exponents)

    def _direction(self, block: Block, u: Tensor | None, spec: DirectionSpec, count: int | None) -> Direction:
        direction, retained = direction_of(block, self.contrasts, u, spec, self.rank, count, self.chunked)
        if retained is not None:
            before = self.retained_variance
            self.retained_variance = retained if before is None else torch.minimum(before, retained)
        return direction

    def _mixtures(self, specs: dict[Block, DirectionSpec]) -> dict[Block, int | None]:
        """Mixtures of each block's sketch, by the fraction of self-influence in them; None: no self-influence."""
        if not self.self_query or self.rank is None:
            return dict.fromkeys(specs)
        found = {block: spec.discount.expected_self_influence() for block, spec in specs.items()}
        parts = {block: part * specs[block].weight for block, part in found.items() if part is not None}
        table = torch.stack(list(parts.values())).cpu() if parts else torch.zeros(0, 2)
        total = max(float(table[:, 0].sum()), torch.finfo(table.dtype).tiny)
        needed = {block: mixtures(float(part[1]) / total) for block, part in zip(parts, table, strict=True)}
        return {block: needed.get(block, MIN_MIXTURES) for block in specs}

    def _gradients(self, blocks: Sequence[Block], queries: Sequence[BoundQuery]) -> dict[Block, Tensor]:
        """Gradients v [q, *layout] of some queries, for the blocks that every process has."""
        # the passes of a model split by FSDP2 are collectives, one a parameter: all processes take the same ones
        names = self.processes.common(block.key for block in blocks)
        common = sorted((block for block in blocks if block.key in names), key=lambda block: block.key)
        parameters = [p for block in common for p in block.parameters]
        with isolated(self.module), self.context(), _thawed(parameters):
            found = iter(gradients(queries, self.module, parameters, self.to_device))
        with torch.no_grad():
            v = {b: b.to_layout([next(found) for _ in b.parameters]) for b in common}
        self.processes.exchange()  # averaging is a collective, too: whoever failed has left by now
        self.processes.average(v.values())
        return v

    def draw(self) -> None:
        """Draws new columns for the sketches of self-influence, so that a row's errors average out over the steps."""
        self._draws += 1
        for direction in self._directions.values():
            direction.draw(self._draws)

    @contextlib.contextmanager
    def _only(self, block: Block) -> Iterator[None]:
        """An exception inside drops the modules of this block, and no other."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, FATAL):
                for module in self.table.owners(block):
                    self.drop(module, in_words(error))
            if block in set(self.table):  # the machine's fault, or a block that no layer function made
                raise

    def state_dict(self, together: bool) -> dict[str, Any]:
        """What directions are made of. They themselves are too large to save: a resumed run makes new ones.

        Args:
            together: Whether all processes are here, right after an exchange; else the state is this process's part.
        """
        curvature = {}
        if self.curvature is not None:
            if together:
                self.curvature.pool(self.processes)
            curvature = self.curvature.state_dict()
        reservoir = self.reservoir.state_dict(self.processes if together else None)
        parts = {"draws": self._draws, "noise": self.noise.state_dict(), "schedule": self.schedule.state_dict()}
        parts |= {"outputs": sorted(self.outputs)}
        if isinstance(self.optimizer, JointOptimizer):
            parts |= {"optimizers": self.optimizer.state_dict(), "blocks": self.table.state_dict()}
        return {"curvature": curvature, "reservoir": reservoir, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, before the first batch."""
        if self.curvature is not None:
            self.curvature.load_state_dict(state["curvature"], next(self.module.parameters()).device)
        self.reservoir.load_state_dict(state["reservoir"])
        self.noise.load_state_dict(state["noise"])
        self.schedule.load_state_dict(state["schedule"])
        if isinstance(self.optimizer, JointOptimizer):
            self.optimizer.load_state_dict(state["optimizers"])
            self.table.load_state_dict(state["blocks"])  # not all come in the first pass, which makes directions
            self._trained.update(self.table)
        self._draws, self._outputs = state["draws"], set(state.get("outputs", ()))  # earlier checkpoints have none

    def notes(self) -> list[str]:
        """Sentences for the report about what was left out."""
        chunked = ""
        if self.chunked and self.retained_variance is not None:
            least = f"{float(self.retained_variance):.0%}"
            chunked = f"the queries' directions would be too large; of low rank they retain {least} of signals at least"
        return [note for note in (self.reservoir.note, self.noise.note, chunked) if note]


@contextlib.contextmanager
def _thawed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients can be taken inside of parameters that ``toggle_optimizer`` has frozen for the moment."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
