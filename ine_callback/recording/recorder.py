"""The recorder: records the signals of a training without Lightning, and makes a report of them.

batch → rows → capture → signals → optimizer step → methods; at the end a report. The callback drives it from
Lightning's hooks, a bare PyTorch loop drives it with ``with recorder.batch(rows):``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback.capture import Capture
from ine_callback.data.batches import lent
from ine_callback.errors import InfluenceError
from ine_callback.methods import FINE, FitContext, Method, training_methods
from ine_callback.optimizers.joint import as_one
from ine_callback.queries import QuerySource, parse
from ine_callback.queries.sources import DataSource
from ine_callback.recording.backward import BackwardPasses, Rows
from ine_callback.recording.closing import ClosingPass
from ine_callback.recording.config import RecordingConfig
from ine_callback.recording.counting import CountedBatches
from ine_callback.recording.coverage import Coverage
from ine_callback.recording.guard import Guard
from ine_callback.recording.lanes import Lane, lanes_of
from ine_callback.recording.phases import Phase
from ine_callback.recording.provenance import Clock, run_info, warn_if_incomplete
from ine_callback.recording.readable import Readable
from ine_callback.recording.setup import Training, build, make_store, records_signals, refuse, without_rule
from ine_callback.recording.state import restore_state, saved_state
from ine_callback.recording.steps import OptimizerSteps, watch_steps
from ine_callback.recording.store.recording import NO_STORE
from ine_callback.recording.store.settings import GradientStore
from ine_callback.recording.updates import Updates
from ine_callback.report import InfluenceReport
from ine_callback.utilities.options import InitialWeights, OnError, Uncaptured, check_count, checked_layers


class Recorder(Readable):
    """Records every row's signals while a model trains and turns them into a report.

    Args:
        module: The model.
        optimizer: Its optimizer, or several; a hook on ``step`` tells which gradients were really applied. The steps of
            several between two batches make one observation of the rows.
        rows: Number of training rows (dataset indices 0 .. rows - 1), or None to grow with the rows seen.
        queries: See :class:`~ine_callback.InfluenceCallback`; data is given explicitly, e.g. ``{"val": (x, y)}``.
        loss: Mean loss of a batch, ``(module, batch) -> scalar``; needed by queries on data, the row-order check and
            the fallback.
        methods: Methods to run; f-INE by default.
        total_steps: Optimizer steps planned (0: unknown), for the discount.
        schedulers: Pairs (scheduler, optimizer steps between its steps), for the discount.
        refresh_every: This and the next nine options are those of
            :class:`~ine_callback.recording.config.RecordingConfig`.
        curvature_every: Optimizer steps between curvature updates.
        rank: Most dimensions of a direction; None: all.
        discount: Whether to apply the curvature discount.
        max_dim: Sides of a layer larger than this use a diagonal curvature.
        reservoir: Rows whose gradients are stored for the discount across layers.
        initial_weights: ``random`` (training from scratch) or ``fixed`` (fine-tuning).
        layers: Patterns of the names of the modules to record; None: all.
        uncaptured: What to do about parameters without a capture.
        store: For queries that come after the run.
        accumulate: Micro-batches whose losses are averaged into one step.
        distributed: Whether the processes of the default group train together, each on its part of a batch (DDP; give
            the module without its wrapper). All of them record, and end with the same report.
        on_error: ``"warn"`` stops the recording and lets training go on; ``"raise"`` is for tests.
        source: Where queries get their data; by default from ``loss`` alone.
        to_device: Moves a query's batch to the module's device.
        context: Precision context for the evaluation of queries.
        owner: Class named in messages.
        config: The options together, in place of single ones.

    Attributes:
        guard: The recording's phase, steps and notes.
        config: Its options.
        capture: Hooks that read per-sample gradients.
        coverage: Which parameters the signals cover.
        lanes: One for each optimizer, with the passes that wait for its step.
        closing: The pass over the rows when training is over.

    Example:
        >>> import torch
        >>> from ine_callback import Recorder
        >>> x, y = torch.randn(32, 4), torch.randn(32, 1)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mse = lambda module, batch: torch.nn.functional.mse_loss(module(batch[0]), batch[1])
        >>> recorder = Recorder(model, optimizer, rows=32, queries={"all": (x, y)}, loss=mse, total_steps=8)
        >>> with recorder:
        ...     for rows in torch.arange(32).repeat(2).split(8):
        ...         with recorder.batch(rows, (x[rows], y[rows])):
        ...             loss = mse(model, (x[rows], y[rows]))
        ...             recorder.see(loss)
        ...             loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> recorder.report().rows
        32
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        rows: int | None = None,
        queries: Any = "self",
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        methods: Sequence[Method] | None = None,
        total_steps: int = 0,
        schedulers: Sequence[tuple[Any, int]] = (),
        refresh_every: int | None = RecordingConfig.refresh_every,
        curvature_every: int | None = RecordingConfig.curvature_every,
        rank: int | None = RecordingConfig.rank,
        discount: bool = RecordingConfig.discount,
        max_dim: int = RecordingConfig.max_dim,
        reservoir: int = RecordingConfig.reservoir,
        initial_weights: InitialWeights = RecordingConfig.initial_weights,
        layers: Sequence[str] | None = RecordingConfig.layers,
        uncaptured: Uncaptured = RecordingConfig.uncaptured,
        store: GradientStore | None = RecordingConfig.store,
        accumulate: int = 1,
        distributed: bool = False,
        on_error: OnError = RecordingConfig.on_error,
        source: QuerySource | None = None,
        to_device: Callable[[Any], Any] | None = None,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        owner: str = "Recorder",
        config: RecordingConfig | None = None,
    ) -> None:
        single = RecordingConfig(
            refresh_every=refresh_every,
            curvature_every=curvature_every,
            rank=rank,
            discount=discount,
            max_dim=max_dim,
            reservoir=reservoir,
            initial_weights=initial_weights,
            layers=layers,
            uncaptured=uncaptured,
            store=store,
            on_error=on_error,
        )
        self.config = single.unless(config, owner)
        check_count(owner, "accumulate", accumulate)
        self.queries = parse(queries, owner)
        if loss is not None and source is None:  # the user's own function, which may change a batch
            loss = _lending(loss)
        self.methods = [FINE()] if methods is None else training_methods(methods, owner)
        self.training = Training(
            module,
            as_one(optimizer),
            rows,
            loss,
            source or DataSource(owner, loss),
            total_steps,
            schedulers,
            accumulate,
            distributed,
            to_device or (lambda batch: batch),
            context,
        )
        self.guard = Guard(owner, self.config.on_error, self._leave, self.stop)
        self.capture = Capture(
            module,
            lambda layer, grad_samples: self._passes.receive(layer, grad_samples),
            self.guard.fail,
            checked_layers(self.config.layers, module, owner),
            lambda lost: self._passes.lose(lost),
        )
        self.coverage = Coverage(module, self.capture, self.config.uncaptured, owner)
        self.lanes = lanes_of(self.training.optimizer)
        self._handles: list[Any] = []
        self.closing = ClosingPass(self.methods, self.config)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, fresh: bool = False) -> None:
        """Binds the queries, attaches the hooks.

        Args:
            fresh: Whether the model was not trained in this process yet, so no compiled code need be compiled anew.

        Raises:
            InfluenceError: About anything that can be known before the first step.
        """
        guard, training, owner = self.guard, self.training, self.guard.owner
        records = records_signals(self.methods)
        if records:
            refuse(training, self.config, self.capture, self.coverage, owner)
        self._parts = build(
            training, self.config, self.queries, self.methods, self.capture, self.coverage, self.lanes, owner
        )
        updates = Updates(self.config.refresh_every, self.config.curvature_every)
        self._steps = OptimizerSteps(guard, self._parts, updates, self.closing.follow)
        self._passes: Any = CountedBatches(guard, self._parts, self._steps)
        if records:
            self._passes = BackwardPasses(guard, self._parts, updates, self._steps)
            self.capture.attach(fresh)
        for warning in without_rule(training.optimizer) if records else []:
            guard.warn(warning)
        self._handles = watch_steps(self.lanes, guard, self._ready, self._steps.end)
        self._clock = Clock()
        guard.phase = Phase.PROBING if records else Phase.RECORDING

    def stop(self, closing: bool = True) -> None:
        """Removes every hook; scores stay available.

        Args:
            closing: Whether a method that wants one gets its closing pass; not after a training that was interrupted.
        """
        self.capture.detach()
        if self.running:
            self.update()
            if closing:
                self.close()
            guard, parts = self.guard, self._parts
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            warn_if_incomplete(guard, records_signals(self.methods))
            self._clock.stop()
            self._passes.close()
            parts.signals.forget()
            parts.processes.close()
            guard.phase = Phase.STOPPED

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(closing=exc[0] is None)

    def close(self, context: Callable[[], FitContext] | None = None) -> None:
        """The closing pass, at the final weights, where a method wants one, and the store; :meth:`stop` calls it.

        Args:
            context: Makes the trained model with its rows; by default with the batches of the last pass over the rows.
        """
        store, curvature = self._parts.store, self._parts.signals.curvature
        together = self.recording and self._parts.processes.count > 1  # alone, the report makes the store
        if store is not None and curvature is not None and together:
            self._storing(lambda: store.prepare(curvature))
        self.closing.run(self._parts, self.guard, context)
        if together:
            self._storing(lambda: make_store(self._parts, self.accumulators.scores()))

    def _storing(self, make: Callable[[], object]) -> None:
        """A step towards the store, which all processes take together; what fails costs the store alone."""
        store = self._parts.store
        if store is None or store.failure:
            return
        try:
            make()
        except Exception as error:
            self._parts.processes.leave()  # the others do not wait
            store.fail(error)
            if self.config.on_error == "raise":
                raise
            self.guard.warn(NO_STORE.format(store.failure))

    def _leave(self) -> None:
        """After an exception: nothing more is read, and other processes do not wait for this one."""
        self.capture.active = False
        self._parts.processes.leave()

    # -- one batch: nothing happens before `start`, and there are no parts to ask yet ---------------------------------

    @contextlib.contextmanager
    def batch(self, rows: Tensor | Sequence[int], data: Any = None) -> Iterator[None]:
        """Surrounds the forward and backward pass of one batch.

        Args:
            rows: Dataset index of each row of the batch [b].
            data: The batch itself; needed once for the row-order check and by ``uncaptured="fallback"``.
        """
        self.start_batch(rows, data)
        try:
            yield
        finally:
            self.end_batch()

    def start_batch(self, rows: Rows, data: Any = None) -> None:
        """Announces the rows of the coming forward pass, or a function that finds them in the batch."""
        self.update()
        self.guard.run(lambda: self._start_batch(rows, data))

    def _start_batch(self, rows: Rows, data: Any) -> None:
        self._passes.start_batch(rows, data)
        if self.closing.recent.wanted and self._passes.rows is not None:
            self.closing.recent.add(self._passes.rows, data, self.accumulators.check.count)

    def see(self, loss: Tensor) -> None:
        """Reads each row's loss and the loss's scale off the loss about to be differentiated, before its backward pass.

        Optional, but bare parameters (class tokens, position tables) are recorded only where the loss is seen.
        """
        self.guard.run(lambda: self._passes.see(loss))

    def after_backward(self) -> None:
        """Closes a backward pass: its signals wait for the optimizer's step. The first one also verifies the capture.

        Optional: the end of the batch, or of the closure of ``optimizer.step(closure)``, tells as well.
        """
        self.guard.run(lambda: self._passes.settle(True))

    def end_batch(self) -> None:
        """Ends the batch; its signals wait for the optimizer's step."""
        self.guard.run(lambda: self._passes.end_batch())

    def update(self) -> None:
        """Takes the steps of several optimizers since the batch began as one; the next batch's start calls it too."""
        self.guard.count_update()
        self.guard.run(lambda: self._steps.update())

    def discard(self) -> None:
        """Forgets the passes so far: their step was skipped, or their gradients were removed."""
        self.guard.run(lambda: self._steps.discard())

    def measure_clipping(self) -> None:
        """Called with the unclipped gradients (optional, but for several processes that clip inside of the batch)."""
        self.guard.run(lambda: self._passes.settle(False))

    def _ready(self, lane: Lane) -> None:
        """The gradients are as the optimizer uses them."""
        self._passes.settle(False)
        self._steps.measure_changes(lane, last=True)

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def report(self) -> InfluenceReport:
        """The report of everything recorded so far; with its gradient store once the recording has stopped.

        Raises:
            InfluenceError: If the recorder was never started.
        """
        if self.guard.phase is Phase.IDLE:
            raise InfluenceError(
                f"{self.guard.owner}: nothing was recorded; put `with recorder:` around the training loop."
            )
        self.update()
        self._steps.note_left_out()
        scores, store = self.accumulators.scores(), self._parts.store
        if store is not None and store.made is None and self.guard.phase is Phase.STOPPED:
            if self._parts.processes.count == 1:  # also after an interruption
                self._storing(lambda: make_store(self._parts, scores))
            else:
                self.guard.note("the processes' parts of the gradient store were not joined: training was interrupted")
        if store is not None and store.failure:
            self.guard.note(NO_STORE.format(store.failure))
        names = {"queries": list(self.queries), "methods": [type(method).__name__ for method in self.methods]}
        info = run_info(self.guard, self._clock, self._parts, names | self.config.facts())
        return InfluenceReport(scores, info, store=None if store is None else store.made)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: tensors and plain types. With several processes, all must call it.

        The queries' directions are too large to store. They are made anew at the next step, here as in the resumed run,
        so that both end with the same scores.
        """
        self.update()
        return saved_state(self.guard, self._clock, self._parts, self._steps, self.closing.snapshots)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned, after :meth:`start` and before the first batch.

        Raises:
            InfluenceError: If it was recorded with other queries or methods, or with more rows.
        """
        restore_state(state, self.guard, self._clock, self._parts, self._steps, self.closing.snapshots)


def _lending(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss of a copy of the batch, which it may change."""
    return lambda module, batch: loss(module, lent(batch))
