"""Before the first step: what cannot be recorded is refused, and the parts of a recording are built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ine_callback.capture import Capture
from ine_callback.curvature.gradient_sample import MIN_ROWS, GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.distributed.processes import Lockstep
from ine_callback.distributed.sharding import is_sharded
from ine_callback.errors import CaptureError, InfluenceError
from ine_callback.methods import Method
from ine_callback.optimizers.joint import AnyOptimizer, JointOptimizer, each_of
from ine_callback.optimizers.registry import known
from ine_callback.optimizers.schedule import Schedule, planned_schedule
from ine_callback.queries import SELF, BoundQuery, Query, QuerySource, SelfQuery
from ine_callback.recording.accumulators import RowAccumulators
from ine_callback.recording.config import RecordingConfig
from ine_callback.recording.coverage import OUTSIDE, Coverage
from ine_callback.recording.lanes import Lane
from ine_callback.recording.store.recording import StoreRecording, store_of
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.scores import QueryInfo, Scores
from ine_callback.scoring.initial_noise import InitialNoise
from ine_callback.scoring.sign_contrasts import CONTRASTS, Contrasts
from ine_callback.scoring.signals import Signals


@dataclass(frozen=True)
class Training:
    """What a recorder is told of the training that it records; see :class:`~ine_callback.Recorder`."""

    module: nn.Module
    optimizer: AnyOptimizer
    rows: int | None
    loss: Callable[[nn.Module, Any], Tensor] | None
    source: QuerySource
    total_steps: int
    schedulers: Sequence[tuple[Any, int]]
    accumulate: int
    distributed: bool
    to_device: Callable[[Any], Any]
    context: Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Parts:
    """What a recording works with, from its start to its end.

    Attributes:
        training: The training that is recorded.
        methods: What accumulates over the steps.
        bound: The queries on data, with their batches.
        device: Where signals and accumulators live.
        sharded: Whether FSDP2 splits the parameters.
        processes: Those that train together.
        schedule: The learning rate that remains.
        capture: Hooks that read per-sample gradients.
        coverage: Which parameters the signals cover.
        lanes: One for each optimizer: the passes that wait for its step, and what becomes of their gradients.
        signals: Directions, and the per-sample gradients' inner products with them.
        accumulators: Everything kept for every row.
        store: What later queries are asked of; None where none is wanted.
    """

    training: Training
    methods: Sequence[Method]
    bound: list[BoundQuery]
    device: torch.device
    sharded: bool
    processes: Lockstep
    schedule: Schedule
    capture: Capture
    coverage: Coverage
    lanes: Sequence[Lane]
    signals: Signals
    accumulators: RowAccumulators
    store: StoreRecording | None


def records_signals(methods: Sequence[Method]) -> bool:
    """Whether a method needs signals; else rows are counted, and no hook reads the training's passes."""
    return any(method.needs_signals for method in methods)


def refuse(training: Training, config: RecordingConfig, capture: Capture, coverage: Coverage, owner: str) -> None:
    """Refuses a training whose signals cannot be recorded.

    Raises:
        InfluenceError: With the remedy.
    """
    module = training.module
    if any(isinstance(each, torch.optim.LBFGS) for each in each_of(training.optimizer)):
        raise InfluenceError(
            f"{owner}: LBFGS evaluates its closure several times a step, so no batch is the step's; use SGD, "
            "Adam or AdamW, or leave the recording out."
        )
    if isinstance(training.optimizer, JointOptimizer):
        _refuse_optimizers(training.optimizer, module, owner)
    if any(is_lazy(p) for p in module.parameters()):
        raise InfluenceError(
            f"{owner}: a lazy module has no weights yet, and a pass of the recording would draw others "
            "than the training does; run one batch through the model first (in configure_model or before the fit)."
        )
    _name_outside(training, config, coverage, owner)
    if config.uncaptured == "fallback" and is_sharded(module):
        raise InfluenceError(
            f"{owner}: uncaptured='fallback' cannot take single rows' gradients of parameters that processes "
            "share; pass 'warn' or 'raise', or train with strategy='ddp'."
        )


def _name_outside(training: Training, config: RecordingConfig, coverage: Coverage, owner: str) -> None:
    """Names what the optimizers train that is not the module's.

    Raises:
        CaptureError: With ``uncaptured="raise"``.
    """
    own = set(training.module.parameters())
    groups = [group for each in each_of(training.optimizer) for group in each.param_groups]
    found = [p for group in groups for p in group["params"] if p not in own and p.requires_grad]
    if not found:
        return
    sizes = ", ".join(str(list(p.shape)) for p in found[:4]) + ", ..." * (len(found) > 4)
    told = f"the optimizer trains {len(found)} {OUTSIDE} ({sizes}); make their layers parts of it (nn.ModuleList)"
    if config.uncaptured == "raise":
        raise CaptureError(f"{owner}: {told}, or pass uncaptured='warn'.")
    coverage.name_outside(told, sum(p.numel() for p in found))


def _refuse_optimizers(optimizer: JointOptimizer, module: nn.Module, owner: str) -> None:
    if not optimizer.each:
        raise InfluenceError(f"{owner}: there is no optimizer, so nothing trains; give one, or do not record.")
    if shared := optimizer.shared():
        names = sorted(name for name, p in module.named_parameters() if p in shared)
        raise InfluenceError(
            f"{owner}: two optimizers have the parameters {names}, so a gradient is applied twice, at different rates; "
            "give each parameter to one optimizer."
        )
    if is_sharded(module):
        raise InfluenceError(
            f"{owner}: {len(optimizer.each)} optimizers of parameters that processes share (FSDP2) are not supported; "
            "use one, train with strategy='ddp', or leave the recording out."
        )


def without_rule(optimizer: AnyOptimizer) -> list[str]:
    """Warnings of optimizers that have no update rule."""
    kinds = dict.fromkeys(type(each).__name__ for each in each_of(optimizer) if not known(each))
    return [
        f"{kind} has no update rule: its steps are taken as plain SGD; @register_optimizer({kind}) gives it one"
        for kind in kinds
    ]


def bind(queries: Mapping[str, Query], source: QuerySource, owner: str) -> list[BoundQuery]:
    """Gives the queries their data.

    Raises:
        InfluenceError: If two have one name.
    """
    bound = [each for name, query in queries.items() for each in query.bind(name, source)]
    names = [each.info.name for each in bound]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InfluenceError(f"{owner}: two queries are called {sorted(twice)}; name them differently.")
    return bound


def build(
    training: Training,
    config: RecordingConfig,
    queries: Mapping[str, Query],
    methods: Sequence[Method],
    capture: Capture,
    coverage: Coverage,
    lanes: Sequence[Lane],
    owner: str,
) -> Parts:
    """Builds the parts of a recording, and evaluates each query once.

    Raises:
        InfluenceError: If a query has no data, or its value has no gradient.
    """
    module = training.module
    device = next(module.parameters()).device
    processes = Lockstep(device, alone=not training.distributed)
    bound, scored = bind(queries, training.source, owner), records_signals(methods)
    has_self = scored and any(isinstance(query, SelfQuery) for query in queries.values())
    first, *others = each_of(training.optimizer)
    own = [pair for pair in training.schedulers if getattr(pair[0], "optimizer", first) not in others]
    schedule = planned_schedule(first, training.total_steps, own, keep=[module])
    discount = config.discount and scored
    noise = InitialNoise(module, config.initial_weights if scored else "fixed")
    store = store_of(config.store, discount, training.rows, device, processes, noise.random, owner)
    signals = Signals(
        module,
        bound if scored else [],
        has_self,
        training.optimizer,
        schedule,
        KFAC(config.max_dim) if discount else None,
        gradient_sample(config.reservoir if discount else 0, training.rows),
        noise,
        Contrasts(CONTRASTS if noise.random else 0),
        processes,
        config.rank,
        training.to_device,
        training.context,
        capture.drop,
        None if store is None else store.compression,
    )
    signals.check()
    accumulators = RowAccumulators(
        owner,
        training.rows,
        _infos(bound, has_self) if scored else (),
        methods,
        device,
        noise.random,
        signals.contrasts.count,
    )
    return Parts(
        training,
        methods,
        bound,
        device,
        is_sharded(module),
        processes,
        schedule,
        capture,
        coverage,
        lanes,
        signals,
        accumulators,
        store,
    )


def gradient_sample(size: int, rows: int | None) -> GradientSample:
    """The gradient sample: half of what it is asked for, or all rows, must fit."""
    return GradientSample(size, least=max(MIN_ROWS, min(size // 2, rows or size)))


def _infos(bound: Sequence[BoundQuery], has_self: bool) -> tuple[QueryInfo, ...]:
    return (*(query.info for query in bound), *((SELF,) if has_self else ()))


def make_store(parts: Parts, scores: Scores) -> StoredVectors | None:
    """The gradient store as it will be on disk, made once; None where there is none. Includes exchanges."""
    if parts.store is None or parts.signals.curvature is None:
        return None
    if isinstance(parts.training.optimizer, JointOptimizer) and parts.training.optimizer.by_turns:
        raise InfluenceError("the optimizers take turns, each with a loss of its own")
    parts.store.make(scores, parts.signals.table.names, parts.signals.curvature)
    return parts.store.made
