"""The recorder: the flow of one training step as a plain state machine, without Lightning.

batch → rows → capture → signals → optimizer step → methods; at the end a report. The callback drives it from
Lightning's hooks, a bare PyTorch loop drives it with ``with recorder.batch(rows):``.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ine_callback.capture import Capture, GradSample
from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.passes import Passes
from ine_callback.capture.row_losses import Scale, read_loss
from ine_callback.capture.verification import Verification
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.intervals import curvature_interval, refresh_interval
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.low_rank import RANK
from ine_callback.distributed.processes import Lockstep
from ine_callback.distributed.sharding import is_sharded
from ine_callback.errors import InfluenceError, RowsError, UntoldRows
from ine_callback.methods import FINE, Method, training_methods
from ine_callback.optimizers.clipping import Clipping
from ine_callback.optimizers.rates import known, plan, step_rate
from ine_callback.queries import SELF, BoundQuery, QuerySource, SelfQuery, parse
from ine_callback.queries.sources import DataSource
from ine_callback.recording.accumulators import RowAccumulators
from ine_callback.recording.coverage import Coverage
from ine_callback.recording.guard import Guard
from ine_callback.recording.observations import Pass, Pending
from ine_callback.recording.provenance import SINGLE, incomplete, run_info
from ine_callback.report import InfluenceReport
from ine_callback.scoring.initial_noise import InitialNoise
from ine_callback.scoring.sign_contrasts import CONTRASTS, Contrasts
from ine_callback.scoring.signals import Signals
from ine_callback.utilities.options import InitialWeights, OnError, Uncaptured, check_options, checked_layers, given


class Recorder(Guard):
    """Records every row's signals while a model trains and turns them into a report.

    Args:
        module: The model.
        optimizer: Its optimizer; a hook on its ``step`` tells which gradients were really applied.
        rows: Number of training rows (dataset indices 0 .. rows - 1), or None to grow with the rows seen.
        queries: See :class:`~ine_callback.InfluenceCallback`; data is given explicitly, e.g. ``{"val": (x, y)}``.
        loss: Mean loss of a batch, ``(module, batch) -> scalar``; needed by queries on data, the row check and the
            fallback.
        methods: Methods to run; f-INE by default.
        total_steps: Optimizer steps planned (0: unknown), for the discount.
        schedulers: Pairs (scheduler, optimizer steps between its steps), for the discount.
        refresh_every: Optimizer steps between refreshes of the directions; None: 20 at first, later an eighth of the
            steps so far.
        curvature_every: Optimizer steps between observations of the curvature (they are averaged over the run); None: 4
            at first, later a 64th of the steps so far.
        rank: Most dimensions of a layer's inputs, for each query, in which directions are held, where those keep 99 %
            of the signals' variance (else all); None: all, and self-influence without sketches.
        discount: Whether to apply the curvature discount.
        max_dim: Sides of a layer larger than this use a diagonal curvature.
        reservoir: Rows whose captured gradients are kept for the part of the discount that sees across layers (0:
            none).
        initial_weights: ``random`` (training from scratch) counts the draw of the initial weights as training
            randomness; ``fixed`` (fine-tuning) only the order of the rows.
        layers: Patterns of the names of the modules to record, e.g. ``["*.11.*", "head"]``; None: all.
        uncaptured: What to do about parameters without a capture: name them, raise, or use per-row autograd (slow).
        accumulate: Micro-batches whose losses are averaged into one step.
        distributed: Whether the processes of the default group train together, each on its part of a batch (DDP; give
            the module without its wrapper). All of them record, and end with the same report.
        on_error: ``"warn"`` stops the recording and lets training go on; ``"raise"`` is for tests.
        source: Where queries get their data; by default from ``loss`` alone.
        owner: Class named in messages.

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
        optimizer: Optimizer,
        rows: int | None = None,
        queries: Any = "self",
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        methods: Sequence[Method] | None = None,
        total_steps: int = 0,
        schedulers: Sequence[tuple[Any, int]] = (),
        refresh_every: int | None = None,
        curvature_every: int | None = None,
        rank: int | None = RANK,
        discount: bool = True,
        max_dim: int = 1024,
        reservoir: int = 800,
        initial_weights: InitialWeights = "random",
        layers: Sequence[str] | None = None,
        uncaptured: Uncaptured = "warn",
        accumulate: int = 1,
        distributed: bool = False,
        on_error: OnError = "warn",
        source: QuerySource | None = None,
        to_device: Callable[[Any], Any] | None = None,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        owner: str = "Recorder",
    ) -> None:
        counts = {"refresh_every": refresh_every, "curvature_every": curvature_every, "rank": rank}
        check_options(
            owner, on_error, uncaptured, initial_weights, **given(counts), max_dim=max_dim, accumulate=accumulate
        )
        super().__init__(owner, on_error)
        self.module, self.optimizer = module, optimizer
        self.queries = parse(queries, owner)
        self.methods = [FINE()] if methods is None else training_methods(methods, owner)
        self.refresh_every, self.curvature_every = refresh_every, curvature_every
        self.accumulate, self.distributed = accumulate, distributed
        self._loss, self._rows = loss, rows
        self.source = source or DataSource(owner, loss)
        self._horizon = (total_steps, schedulers)
        self._max_dim, self._rank = max_dim if discount else None, rank
        self._reservoir = GradientSample(reservoir if discount else 0)
        self._initial_weights: InitialWeights = initial_weights
        self._to_device, self._context = to_device or (lambda batch: batch), context
        self.capture = Capture(module, self._receive, self.fail, checked_layers(layers, module, owner), self._lose)
        self.coverage = Coverage(module, self.capture, uncaptured, owner)
        self.config: dict[str, Any] = {
            "queries": list(self.queries),
            "methods": [type(m).__name__ for m in self.methods],
            "refresh_every": refresh_every,
            "curvature_every": curvature_every,
            "rank": rank,
            "discount": discount,
            "max_dim": max_dim,
            "reservoir": reservoir,
            "initial_weights": initial_weights,
            "layers": None if layers is None else list(layers),
            "uncaptured": uncaptured,
        }
        self.running = False
        self._handles: list[Any] = []
        self._pending = Pending()
        self._row_losses: Tensor | None = None
        self._left_out: Counter[str] = Counter()  # reason -> batches
        self._gap = False  # whether a batch of the present step is left out
        self._batch: tuple[Tensor, Any] | None = None
        self._received = self._settled = False
        self._passes, self._lost = Passes(self._pass_over), 0
        self._passing = False  # whether a backward pass has begun and is not yet known to be over
        self._made = self._saved = 0  # steps before the directions were made, and a state was last saved
        self._next_curvature_update = 0  # the step that looks at the curvature next
        self.clipping = Clipping(optimizer)
        self._seconds = 0.0
        self.widest = 0  # most rows in a step

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Binds the queries, attaches the hooks.

        Raises:
            InfluenceError: About anything that can be known before the first step.
        """
        self._refuse()
        self._sharded = is_sharded(self.module)
        self._device = next(self.module.parameters()).device
        self._processes = Lockstep(self._device, alone=not self.distributed)
        bound = self.bound = self._bind()
        has_self = any(isinstance(query, SelfQuery) for query in self.queries.values())
        self.infos = (*(query.info for query in bound), *((SELF,) if has_self else ()))
        self.schedule = plan(self.optimizer, *self._horizon, keep=[self.module])
        noise = InitialNoise(self.module, self._initial_weights)
        self.signals = Signals(
            self.module,
            bound,
            has_self,
            self.optimizer,
            self.schedule,
            KFAC(self._max_dim) if self._max_dim is not None else None,
            self._reservoir,
            noise,
            Contrasts(CONTRASTS if noise.random else 0),
            self._processes,
            self._rank,
            self._to_device,
            self._context,
            self.capture.drop,
        )
        self.signals.check()
        self.accumulators = RowAccumulators(
            self.owner,
            self._rows,
            self.infos,
            self.methods,
            self._device,
            noise.random,
            self.signals.contrasts.count,
        )
        if not known(self.optimizer):
            kind = type(self.optimizer).__name__
            self.warn(f"{kind} is not SGD, Adam or AdamW: its steps are taken as plain SGD")
        self.capture.attach()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(lambda *_: self._stepped()),
        ]
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self._clock = time.monotonic()
        self.running = self.recording = True

    def _refuse(self) -> None:
        """Raises about what cannot be recorded."""
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise InfluenceError(
                f"{self.owner}: LBFGS evaluates its closure several times a step, so no batch is the step's; use SGD, "
                "Adam or AdamW, or leave the recording out."
            )
        if self.capture.dropped and not self.capture.names and self.config["uncaptured"] != "fallback":
            raise InfluenceError(
                f"{self.owner}: no layer can be recorded: {self.coverage.first_reason()}; train without torch.compile, "
                "or pass uncaptured='fallback' (slow: one backward pass a row)."
            )
        if any(is_lazy(p) for p in self.module.parameters()):
            raise InfluenceError(
                f"{self.owner}: a lazy module has no weights yet, and a pass of ours would draw others than the "
                "training does; run one batch through the model first (in configure_model or before the fit)."
            )
        if self.config["uncaptured"] == "fallback" and is_sharded(self.module):
            raise InfluenceError(
                f"{self.owner}: uncaptured='fallback' cannot take single rows' gradients of parameters that processes "
                "share; pass 'warn' or 'raise', or train with strategy='ddp'."
            )

    def stop(self) -> None:
        """Removes every hook; scores stay available."""
        self.capture.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.running:
            if (self.failed or self.taken) and (missing := incomplete(self)):
                warnings.warn(f"{self.owner}: {missing}", stacklevel=2)
            self._seconds = time.monotonic() - self._clock
            self._end_proof()
            self.signals.forget()
            self._processes.close()
        self.running = False
        super().stop()

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _bind(self) -> list[BoundQuery]:
        bound = [b for name, query in self.queries.items() for b in query.bind(name, self.source)]
        names = [b.info.name for b in bound]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InfluenceError(f"{self.owner}: two queries are called {sorted(twice)}; name them differently.")
        return bound

    # -- one batch ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self, rows: Tensor | Sequence[int], data: Any = None) -> Iterator[None]:
        """Surrounds the forward and backward pass of one batch.

        Args:
            rows: Dataset index of each row of the batch [b].
            data: The batch itself; needed once for the row check and by ``uncaptured="fallback"``.
        """
        self.start_batch(rows, data)
        try:
            yield
        finally:
            self.end_batch()

    def start_batch(self, rows: Tensor | Sequence[int] | Callable[[Any], Any], data: Any = None) -> None:
        """Announces the rows of the coming forward pass, or a function that finds them in the batch."""
        self.guarded(self._start_batch, rows, data)

    def _start_batch(self, rows: Tensor | Sequence[int] | Callable[[Any], Any], data: Any) -> None:
        try:
            rows = self.accumulators.check.rows(rows(data) if callable(rows) else rows, data)
            if self._gap and self.signals.held is not None:  # its gradients are not this step's alone
                raise UntoldRows("the first step's rows must all be known")
        except UntoldRows as error:
            return self._leave_out(error)
        rows = rows.to(self._device, torch.int64, non_blocking=True)
        self._batch, self._settled, self._row_losses = (rows, data), False, None
        due = False
        if not self._pending:
            self._prepare(rows, data)
            due = self.coverage.due(self.steps)
            if self.coverage.wanted > 1 and self.signals.held is None:
                self.signals.hold()
            self.coverage.wanted = 0
        self.signals.observing = (
            curvature_interval(self.steps, self.curvature_every) if self.steps >= self._next_curvature_update else 0
        )
        self.capture.start_batch(len(rows))
        self._lost = self._passes.discarded
        self._passes.start_batch()
        if self.signals.held is not None or due:
            self._begin_proof()
        self.signals.start_batch(len(rows), self._device, len(rows) * self.accumulate)
        self.signals.scale = Scale(float(len(rows) * self.accumulate), float(len(rows) * self.accumulate))

    def _leave_out(self, error: UntoldRows) -> None:
        """Goes on without a batch whose rows are unknown, unless none ever will be known or others wait for it."""
        if self._processes.count > 1 or (error.always and not self.steps and not self._left_out):
            raise error
        self._gap = True
        message = str(error).removeprefix(f"{self.owner}: ").rstrip(".")
        if message not in self._left_out:
            self.warn(f"a batch is left out: {message}")
            self.notes.remove(f"a batch is left out: {message}")
        self._left_out[message] += 1

    def _prepare(self, rows: Tensor, data: Any) -> None:
        """Before a step's first batch: refreshes or draws anew, or holds records back where parameters are new."""
        if self.coverage.thawed() and self.signals.held is None:
            self.signals.hold()
            self._next_curvature_update = self.steps  # what joined has no curvature yet
        if self.signals.held is not None:
            self.coverage.probe(self._loss, data, len(rows), self._processes)
        elif self._saved > self._made or self.steps - self._made >= refresh_interval(self._made, self.refresh_every):
            self.coverage.agree(self._processes)
            self.signals.refresh()
            self._made = self.steps
            self.coverage.refreshed()
        elif self.steps >= self._next_curvature_update:
            self.signals.draw()

    def see(self, loss: Tensor) -> None:
        """Reads each row's loss and the loss's scale off the loss about to be differentiated (optional)."""
        self.guarded(self._see, loss)

    def _see(self, loss: Tensor) -> None:
        if self._batch is None:
            return
        rows = self._batch[0]
        with torch.no_grad():
            reading = read_loss(loss, len(rows))
            if reading is None:
                self.note("the training loss is of no standard form: taken as a mean over rows, row losses unknown")
                return
            self._row_losses = reading.rows
            scale = 1.0 if self.capture.unscale is None else self.capture.unscale
            self.signals.scale = Scale(reading.terms / scale, reading.scale / scale)

    def after_backward(self) -> None:
        """Closes a backward pass: its signals wait for the optimizer's step. The first one also proves the capture.

        Optional: the end of the batch, or of the closure of ``optimizer.step(closure)``, tells as well.
        """
        self.guarded(self._settle, True)

    def _pass_over(self) -> None:
        """Told by autograd; under DDP gradients are still to be averaged then."""
        if not self.distributed:
            self.guarded(self._pass_ended)

    def _pass_ended(self) -> None:
        """Measures the gradients, before anybody else sees them."""
        self._passing = False
        with torch.no_grad():
            self.clipping.mark()

    def _look(self, last: bool = False) -> None:
        """Takes what was done to the gradients since the backward pass, or the last look, into account.

        Args:
            last: Whether the optimizer uses them now; else a further pass adds to them.
        """
        if not self._pending or not self.clipping.marked:
            return
        if self.clipping.gone():
            return self._discard()
        if not self.clipping.watching:
            if self.clipping.touched():
                self.clipping.watching = True
                self._discard()
                self.note(
                    f"step {self.steps} is left out: gradients were changed between backward pass and step by code "
                    "that was not expected; they are measured from then on"
                )
            return
        unscale, scale = self.capture.unscale, getattr(self.optimizer, "grad_scale", None)
        with torch.no_grad():
            before = 1.0 if unscale is None or not last else unscale
            change = self.clipping.change(before, 1.0 if scale is None or not last else 1.0 / scale)
        if change is not None and not last and change.zeroed():
            return self._discard()
        if change is not None:
            self._pending.change(change)

    def _release(self, rows: Tensor, data: Any) -> None:
        """The first backward pass: proves the capture and makes the first directions."""
        self._processes.exchange()
        if not self._prove(rows, data):  # an overflow, whose step is skipped: the next pass is it
            self.signals.held = []
            return
        self.signals.release(1.0 if self.capture.unscale is None else self.capture.unscale)
        self._made = self.steps

    def _begin_proof(self) -> None:
        """Has the coming gradients compared with the sums of the records."""
        self.signals.proof = self.coverage.begin(self.fail)

    def _prove(self, rows: Tensor, data: Any) -> bool:
        """Drops what the proof finds wrong, also among the fallback's; False where gradients overflowed."""
        proof, self.signals.proof = self.signals.proof, None
        assert proof is not None
        proof.close()
        finite = self.coverage.prove(proof, self.signals, self._processes, self.steps, self._passes.count)
        if finite:
            self._fall_back(rows, data, proof)
            if not any(True for _ in self.signals.table):
                raise RowsError(f"{self.owner}: {self.coverage.nothing_left(len(rows))}")
        return finite

    def _receive(self, module: nn.Module, grad_samples: dict[str, GradSample]) -> None:
        own = self.signals.table.trainable(module)
        self._passes.touch((known for _, known in own), self._begin_pass)
        self._received = True
        if self.signals.proof is not None and self._sharded:
            for p, known in own:
                self.signals.proof.watch(p, known)
        self.signals.receive(module, grad_samples, self.capture.calls.get(module, 1))

    def _lose(self, module: nn.Module) -> None:
        """A layer was dropped: the others go on, if there are any."""
        self.signals.lose(module)
        if self.signals.held is None and not any(True for _ in self.signals.table):
            self.fail(RowsError(f"no layer is left to record: {self.coverage.first_reason()}"))

    def _begin_pass(self) -> None:
        """The first record of a backward pass: forgets passes whose gradients are gone; proves what never was."""
        if (self._received or self._pending) and not self._sharded and self._passes.gone():
            self.signals.discard_received()
            self.capture.forget()
            self._discard()
            self._received = False
            self._passes.discarded = self._passes.count
        elif self.clipping.marked and self.signals.held is None and self.signals.proof is None:
            self._settle(False)
            # of other layers' parameters some may have met this pass already
            if self.clipping.touched({p for module in self.capture.names for p in own_parameters(module).values()}):
                self._look()
        self._passing = True
        self.signals.aside = self._passes.count < self._lost
        if self.signals.held is not None:  # what is held back is proved
            if self.signals.proof is None:
                self._begin_proof()
            return
        if not self.coverage.changed(self._passes.count):
            return
        if self._processes.count > 1 or self._received:  # all of them prove, and hold back, in the same step
            self.coverage.asks |= 3 if self.coverage.joining else int(self.signals.proof is None)
            return
        if self.signals.proof is None:
            self._begin_proof()
        if self.coverage.joining:
            self.signals.hold()

    def _fall_back(self, rows: Tensor, data: Any, proof: Verification | None = None) -> None:
        slow = self.coverage.fallback(self._loss, data, len(rows), self.signals, proof)
        for block, grad_sample in slow:
            self.signals.take(block, grad_sample)

    def end_batch(self) -> None:
        """Ends the batch; its signals wait for the optimizer's step."""
        self.guarded(self._end_batch)

    def _end_batch(self) -> None:
        # nothing received: no backward pass at all, or one that no hook could read; only the latter leaves gradients
        unread = self.signals.held is not None or self.coverage.slow
        self._settle(unread and not self._settled and any(p.grad is not None for p in self.module.parameters()))
        self.capture.active = False
        self._batch = None
        self._end_proof()

    def _end_proof(self) -> None:
        """Leaves a proof that no backward pass came to."""
        proof, self.signals.proof = self.signals.proof, None
        if proof is not None:
            proof.close()

    def _settle(self, backward: bool) -> None:
        """Moves the signals of the backward passes so far to those that wait for the optimizer's step."""
        if self._batch is None or not (self._received or backward):
            return
        if self._passing or not self._received:
            self._pass_ended()
        rows, data = self._batch
        with self.capture.paused():
            self.coverage.look(self.signals, self.steps)
            if self.signals.held is not None:
                self._release(rows, data)
            elif self.signals.proof is not None:
                self._prove(rows, data)
            else:
                self._fall_back(rows, data)
        with torch.no_grad():
            blocks, signals, own = self.signals.settle(self.clipping.watching)
            losses = torch.full_like(own, torch.nan) if self._row_losses is None else self._row_losses.to(own.dtype)
            self._pending.add(Pass(rows, blocks, signals, own, losses))
        self._received, self._settled = False, True

    def discard(self) -> None:
        """Forgets the passes so far: their step was skipped, or their gradients were removed."""
        self.guarded(self._discard)

    def _discard(self) -> None:
        self._pending.clear()
        self.clipping.forget()
        self._gap = False

    # -- one optimizer step -------------------------------------------------------------------------------------------

    def measure_clipping(self) -> None:
        """Called with the unclipped gradients (optional, but for several processes that clip inside of the batch)."""
        self.guarded(self._settle, False)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """The gradients are as they will be used; or they will be when the closure, if there is one, has run."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not self.recording or not callable(closure):
            self.guarded(self._ready)
            return None

        def watched() -> Any:
            loss = closure()
            self.guarded(self._ready)
            return loss

        return (
            (args, {**kwargs, "closure": watched}) if "closure" in kwargs else ((args[0], watched, *args[2:]), kwargs)
        )

    def _ready(self) -> None:
        self._settle(False)
        self._look(last=True)

    def _stepped(self) -> None:
        self.taken += 1
        self.guarded(self._after_step)

    def _after_step(self) -> None:
        self._gap = False
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.schedule.advance(lr)
        self.clipping.forget()
        with torch.no_grad():
            self._join_changes()
            observations = self._pending.take(self.signals.columns, self.signals.contrasts.count, self._device)
            told = 4 * self.accumulators.check.count + self.coverage.asks  # two numbers in one
            sizes, said = zip(*self._processes.exchange(len(observations.rows), told), strict=True)
            known = [one // 4 for one in said]
            self.coverage.asks, self.coverage.wanted = 0, self.coverage.wanted | max(one % 4 for one in said)
            if not any(sizes):
                return
            observations = observations.joined(self._processes, sizes).times(1 / self._processes.count)
            self.accumulators.update(
                observations, step_rate(self.optimizer), self.signals.units(observations.own), max(known)
            )
        self._alone(sum(sizes))
        if self.steps >= self._next_curvature_update:
            self._next_curvature_update = self.steps + curvature_interval(self.steps, self.curvature_every)
        self.steps += 1
        if self.signals.curvature is not None:
            self.signals.curvature.end_step()

    def _join_changes(self) -> None:
        """What was done to the whole gradients, where each process holds parts of them."""
        changes = self._pending.changes
        if not self._sharded:
            return
        if len({count for count, _ in self._processes.exchange(len(changes))}) > 1:
            raise InfluenceError("the processes' gradients were changed at different times")
        self._processes.average([change.moments for change in changes])

    def _alone(self, rows: int) -> None:
        """Tells of steps with a single row once."""
        self.widest = max(self.widest, rows)
        if not self.steps and rows == 1:
            self.warn(SINGLE)

    def give_up(self) -> None:
        super().give_up()
        self.capture.active = False
        self._processes.leave()

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def report(self) -> InfluenceReport:
        """The report of everything recorded so far."""
        if not hasattr(self, "infos"):
            raise InfluenceError(f"{self.owner}: nothing was recorded; put `with recorder:` around the training loop.")
        for reason, count in self._left_out.items():
            self.note(f"{count} batch{'es' if count > 1 else ''} left out: {reason}")
        return InfluenceReport(self.accumulators.scores(), run_info(self))

    @property
    def seconds(self) -> float:
        """How long the recording lasted."""
        return self._seconds or time.monotonic() - self._clock

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: tensors and plain types. With several processes, all must call it.

        The queries' directions are too large to keep. They are made anew at the next step, here as in the resumed run,
        so that both end with the same scores.
        """
        together = self.recording or self._processes.count == 1  # after the end others may be gone
        if together:
            self._processes.exchange()
        self._saved = self.steps
        return {
            "steps": self.steps,
            "look": self._next_curvature_update,
            "failed": self.failed,
            "reason": self.reason,
            "taken": self.taken,
            "widest": self.widest,
            "notes": list(self.notes),
            "left_out": dict(self._left_out),
            "started": self.started.isoformat(),
            "seconds": self.seconds,
            "ledger": self.accumulators.state_dict(),
            "signals": self.signals.state_dict(together) if self.steps and not self.failed else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned, after :meth:`start` and before the first batch.

        Raises:
            InfluenceError: If it was recorded with other queries or methods, or with more rows.
        """
        self.accumulators.load_state_dict(state["ledger"])
        self.steps, self._next_curvature_update = state["steps"], state["look"]
        # checkpoints of 0.1 have no more than the steps
        self.reason, self.taken = state.get("reason", ""), state.get("taken", state["steps"])
        self.widest = state.get("widest", 0)
        self.notes = [*state["notes"], *self.notes]
        self._left_out = Counter(state.get("left_out", {}))
        self.started = datetime.datetime.fromisoformat(state["started"])
        self._clock -= state["seconds"]
        if state["failed"]:
            self.give_up()
        elif state["signals"] is not None:
            self.signals.load_state_dict(state["signals"])
